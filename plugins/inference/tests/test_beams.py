"""Beam search, best-of and further ways to sample give what Transformers gives."""

from __future__ import annotations

import pytest
import torch
from drivetrain_inference import SamplingParams, serve
from drivetrain_inference.requests import Sequence
from drivetrain_inference.sampling.sampler import Sampler, warped
from tiny_decoders import VOCABULARY, decoder
from transformers import (
    EpsilonLogitsWarper,
    EtaLogitsWarper,
    NoRepeatNGramLogitsProcessor,
    TemperatureLogitsWarper,
    TypicalLogitsWarper,
)

from drivetrain.errors import ConfigError

PROMPTS = [[3, 1, 4, 1, 5], [9, 2], [6] * 12]
SMALL = {"inference": {"block_size": 4, "max_batch_tokens": 64, "max_sequences": 16}}
OPTIONS = [
    {"num_beams": 2},
    {"num_beams": 4, "n": 3, "length_penalty": 0.3},
    {"num_beams": 4, "n": 2, "early_stopping": True},
    {"num_beams": 3, "n": 3, "length_penalty": 2.0, "early_stopping": "never"},
    {"num_beams": 3, "repetition_penalty": 1.4, "min_new_tokens": 4},
]


def by_transformers(model, prompt, stops, *, n=1, **options):
    found = model.generate(
        torch.tensor([prompt]), max_new_tokens=14, do_sample=False, eos_token_id=stops,
        pad_token_id=0, num_return_sequences=n, **options,
    )  # fmt: skip
    results = []
    for row in found[:, len(prompt) :].tolist():
        end = next((at for at, token in enumerate(row) if token in stops), len(row) - 1)
        results.append(tuple(row[: end + 1]))
    return results


@pytest.mark.parametrize("options", OPTIONS, ids=lambda options: ",".join(options))
def test_beams_are_those_of_transformers(options):
    model, stops = decoder(), [7, 20, 33, 51, 80]
    params = SamplingParams(max_new_tokens=14, stop_tokens=tuple(stops), **options)
    with serve(model, SMALL) as engine:
        together = engine.generate(PROMPTS, params)
        engine.scheduler.blocks.check([])
    for prompt, results in zip(PROMPTS, together, strict=True):
        wanted = by_transformers(model, prompt, stops, **options)
        assert [result.tokens for result in results] == wanted
        for result in results:
            ended = result.tokens[-1] in stops
            assert result.finish_reason == ("stop" if ended else "length")


def test_searches_that_do_not_fit_at_once_give_way_and_come_back():
    model = decoder()
    params = SamplingParams(max_new_tokens=14, num_beams=4, n=4)
    section = {**SMALL["inference"], "prefix_caching": False}
    with serve(model, {"inference": section}) as engine:
        wanted = engine.generate(PROMPTS, params)
    tight = {**section, "max_sequences": 6, "cache_blocks": 29}
    with serve(model, {"inference": tight}) as engine:
        mixed = [params, SamplingParams(max_new_tokens=14), params, params]
        found = engine.generate([PROMPTS[0], [8, 8], *PROMPTS[1:]], mixed)
        engine.scheduler.blocks.check([])
    del found[1]
    assert [[r.tokens for r in each] for each in found] == [
        [r.tokens for r in each] for each in wanted
    ]


def test_a_cancelled_search_gives_its_blocks_back():
    with serve(decoder(), SMALL) as engine:
        number = engine.add(PROMPTS[0], SamplingParams(max_new_tokens=14, num_beams=4))
        for _ in range(4):
            engine.step()
        (progress,) = engine.cancel(number)
        assert progress.completion.finish_reason == "cancelled"
        assert not engine.busy
        engine.scheduler.blocks.check([])


def test_the_best_of_several_are_those_with_the_highest_logprob_a_token():
    model, options = decoder(), {"max_new_tokens": 10, "temperature": 1.5, "seed": 5}
    with serve(model, SMALL) as engine:
        (all_,) = engine.generate(PROMPTS[:1], SamplingParams(n=6, logprobs=0, **options))
        (best,) = engine.generate(PROMPTS[:1], SamplingParams(n=2, best_of=6, **options))
    ranked = sorted(all_, key=lambda r: -sum(p.chosen for p in r.logprobs) / len(r.tokens))
    assert [each.tokens for each in best] == [each.tokens for each in ranked[:2]]
    assert best[0].logprobs == ()


@pytest.mark.parametrize(("name", "value", "make"), [
    ("typical_p", 0.6, lambda: TypicalLogitsWarper(0.6)),
    ("typical_p", 0.95, lambda: TypicalLogitsWarper(0.95)),
    ("epsilon_cutoff", 0.02, lambda: EpsilonLogitsWarper(0.02)),
    ("eta_cutoff", 0.05, lambda: EtaLogitsWarper(0.05)),
])  # fmt: skip
def test_truncation_leaves_out_what_transformers_leaves_out(name, value, make):
    rows = 3 * torch.randn(20, 50, generator=torch.Generator().manual_seed(0))
    params = SamplingParams(temperature=1.3, **{name: value})
    for row in rows:
        wanted = make()(None, TemperatureLogitsWarper(1.3)(None, row[None]))[0]
        torch.testing.assert_close(warped(row, params), wanted)


@pytest.mark.parametrize("size", [1, 2, 3])
def test_ngrams_do_not_repeat_as_in_transformers(size):
    tokens, row = [1, 2, 3, 1, 2, 4, 1, 2], torch.zeros(6)
    sequence = Sequence(0, 0, tuple(tokens[:5]), SamplingParams(no_repeat_ngram_size=size))
    sequence.output = tokens[5:]
    wanted = NoRepeatNGramLogitsProcessor(size)(torch.tensor([tokens]), row[None])[0]
    assert torch.equal(Sampler().edited(row, sequence), wanted)


@pytest.mark.parametrize("options", [
    {"temperature": 1.0}, {"n": 3}, {"best_of": 4}, {"logprobs": 1}, {"stop": "."},
])  # fmt: skip
def test_beam_search_with_what_it_has_not_is_refused(options):
    with pytest.raises(ConfigError, match="beam search has no"):
        SamplingParams(num_beams=2, **options)


def test_more_beams_than_may_run_are_refused():
    with serve(decoder(), SMALL) as engine, pytest.raises(ConfigError, match="num_beams is 17"):
        engine.add([1], SamplingParams(num_beams=17))
    assert VOCABULARY == 96
