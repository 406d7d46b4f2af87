"""Forwards that the accelerator repeats give what Python's loop gives."""

from __future__ import annotations

import pytest
import torch
from drivetrain_inference import SamplingParams, serve
from drivetrain_inference.fast import decode
from drivetrain_kernels.ops.paged_attention import PAGED_ATTENTION
from drivetrain_kernels.registry import REFERENCE
from tiny_decoders import VOCABULARY, decoder

native = pytest.mark.skipif(
    PAGED_ATTENTION.provider("cpu") == REFERENCE, reason="the CPU's kernels are not built"
)
LENGTHS, NEW = (1, 5, 17, 40, 3), 12
FORMATS = [{}, {"weight_format": "w8a8"}, {"weight_format": "int4"}, {"weight_format": "fp6"}]


def prompts():
    generator = torch.Generator().manual_seed(3)
    return [torch.randint(VOCABULARY, (n,), generator=generator).tolist() for n in LENGTHS]


def served(dtype, **options):
    section = {"block_size": 8, "max_batch_tokens": 64, "max_sequences": 8}
    section |= {"capture_decodes": True, **options}
    return serve(decoder(intermediate_size=64).to(dtype), {"inference": section})


def results_of(engine):
    params = [SamplingParams(max_new_tokens=NEW + n, logprobs=0) for n in range(len(LENGTHS))]
    return [each[0] for each in engine.generate(prompts(), params)]


@native
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [*FORMATS, {"cache_format": "int8"}])
def test_repeated_forwards_have_the_same_bits(dtype, options):
    found = []
    for captured in (False, True):
        with served(dtype, capture_decodes=captured, **options) as engine:
            found.append(results_of(engine))
            replayed = engine.ragged.model._decodes
            assert (replayed is not None) == captured
            if captured:  # results end one after another, so all numbers come
                assert {1, 2, 3, 4, 5} <= replayed._of.keys()
                assert all(each is not None for each in replayed._of.values())
    assert found[0] == found[1]


@native
def test_logits_of_a_repeated_forward_are_the_caller_s():
    with served(torch.float32, capture_decodes=True) as engine, torch.no_grad():
        wanted = [engine.module(torch.tensor([[token]])).logits[0] for token in (5, 7, 11)]
        found = [engine.put([n], [[token]]) for n, token in enumerate((5, 7, 11))]
        assert engine.ragged.model._decodes._of[1] is not None
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


@native
def test_without_capture_nothing_is_repeated():
    with served(torch.float32, capture_decodes=False) as engine:
        assert not engine.ragged.model.captures
        engine.ragged.model.layers_of = counted = Counted(engine.ragged.model.layers_of)
        engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=6))
    assert counted.calls == 6


class Counted:
    def __init__(self, function):
        self.function, self.calls = function, 0

    def __call__(self, *args):
        self.calls += 1
        return self.function(*args)


@native
def test_no_python_of_the_decoder_runs_in_a_repeated_forward(monkeypatch):
    with served(torch.float32) as engine:
        engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=4))
        model, calls = engine.ragged.model, []
        layers_of = model.layers_of
        monkeypatch.setattr(model, "layers_of", lambda *a: calls.append(1) or layers_of(*a))
        engine.generate([[1, 2, 3]], SamplingParams(max_new_tokens=10))
    assert len(calls) == 1  # the prompt


@native
def test_larger_forwards_and_prompts_are_computed_as_ever(monkeypatch):
    monkeypatch.setattr(decode, "MOST_ROWS", 2)
    with served(torch.float32, capture_decodes=False) as engine:
        wanted = results_of(engine)
    with served(torch.float32) as engine:
        assert results_of(engine) == wanted
        assert engine.ragged.model._decodes._of.keys() <= {1, 2}


@native
def test_weights_that_are_taken_over_are_those_of_repeated_forwards():
    model = decoder()
    with serve(model, {"inference": {"block_size": 8, "capture_decodes": True}}) as engine:
        before = results_of(engine)
        model.load_state_dict(decoder(seed=1).state_dict())
        engine.update_weights()
        after = results_of(engine)
    with serve(decoder(seed=1), {"inference": {"capture_decodes": False}}) as engine:
        wanted = results_of(engine)
    assert before != after
    assert [each.tokens for each in after] == [each.tokens for each in wanted]


@native
def test_an_accelerator_that_repeats_nothing_computes_as_ever():
    with served(torch.float32, capture_decodes=False, prefix_caching=False) as engine:
        wanted = results_of(engine)
        asked = []
        engine.capture_with(lambda function: asked.append(function()))
        assert results_of(engine) == wanted
        assert len(asked) == 5  # once for each number of sequences
