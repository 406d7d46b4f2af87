"""Stages whose layers are shared out train like one process, and keep their parts alone."""

from __future__ import annotations

import logging
from typing import Any

import pytest
import torch
from tensor_decoder import ROWS, WIDTH, Decoder
from three_axes import (
    BLOCKS,
    MICRO_BATCHES,
    Curve,
    alone,
    close,
    make,
    parameters,
    train,
    trained_alone,
)
from torch import nn

import drivetrain
from drivetrain.contracts import Kind, Purpose
from drivetrain.testing import run_distributed

STEPS, CLIPPING = 3, 0.05
MESSAGES = {"shared_memory": False}
"""Ranks have to gather together, and in one order."""

Found = tuple[Curve, dict[str, torch.Tensor], int]


def run(layout: tuple[int, int, int], changes: dict[str, Any]) -> Found:
    engine = make(*layout, **changes)
    kept = sum(p.numel() for p in engine.module.parameters())
    curve = train(engine, 0, STEPS)
    found = parameters(engine)
    close(engine)
    return curve, found, kept


CASES = [
    pytest.param((2, 2, 1), {}, id="stage 0"),
    pytest.param(
        (2, 2, 1),
        {"stage": 3, "pipeline": {"schedule": "interleaved"}, "gradient_clipping": CLIPPING},
        id="stage 3, interleaved, clipped",
    ),
    pytest.param(
        (2, 2, 2), {"stage": 2, "gradient_clipping": CLIPPING, "cpu": MESSAGES}, id="eight ranks"
    ),
    pytest.param(
        (2, 2, 1),
        {
            "stage": 1,
            "pipeline": {"schedule": "zb_h1"},
            "tensor_parallel": {"autotp_size": 2, "tp_overlap_comm": True},
        },
        id="weights' gradients in backward",
    ),
]
MORE = [
    pytest.param((4, 2, 1), {"stage": 1}, id="four stages"),
    pytest.param((2, 2, 1), {"stage": 2, "pipeline": {"schedule": "zb_h1"}}, id="zb_h1"),
    pytest.param(
        (2, 2, 2), {"stage": 3, "pipeline": {"schedule": "zb_v"}, "cpu": MESSAGES}, id="V shape"
    ),
    pytest.param(
        (2, 2, 2), {"stage": 3, "zero": {"offload_optimizer": {"device": "cpu"}}}, id="offloaded"
    ),
]


@pytest.mark.parametrize(
    ("layout", "changes"),
    [*CASES, *(pytest.param(*row.values, id=row.id, marks=pytest.mark.long) for row in MORE)],
)
def test_shared_layers_in_stages_train_like_one_process(
    layout: tuple[int, int, int], changes: dict[str, Any]
) -> None:
    pp, tp, dp = layout
    expected, trained = alone(0, STEPS, changes.get("gradient_clipping", 0.0))
    every = sum(p.numel() for p in Decoder(BLOCKS).parameters())
    names: set[str] = set()
    for curve, found, kept in run_distributed(run, pp * tp * dp, layout, changes, timeout=200):
        for point, want in zip(curve, expected, strict=True):
            assert point == pytest.approx(want, rel=1e-8)
        for name, values in found.items():
            torch.testing.assert_close(values, trained[name], rtol=1e-8, atol=1e-10)
        names |= set(found)
        assert changes.get("stage", 0) == 3 or kept < 1.5 * every / (pp * tp)
    assert names == set(trained)


def states(layout: tuple[int, int, int], stage: int) -> dict[str, list[torch.Tensor | None]]:
    """Masters and momentum as scripts ask for them."""
    from drivetrain_zero import safe_get_full_fp32_param, safe_get_full_optimizer_state

    engine = make(*layout, stage)
    train(engine, 0, STEPS)
    found = {}
    for parameter in engine.module.parameters():
        values = safe_get_full_fp32_param(parameter)
        momentum = safe_get_full_optimizer_state(parameter, "momentum_buffer")
        found[engine.job.parameters.info(parameter).name] = [values, momentum]
    close(engine)
    return found


@pytest.mark.parametrize("stage", [1, 3])
def test_scripts_see_whole_states_of_shared_layers_in_stages(stage: int) -> None:
    _, model, optimizer = trained_alone(0, STEPS)
    names: set[str] = set()
    for found in run_distributed(states, 4, (2, 2, 1), stage, timeout=100):
        for name, (values, momentum) in found.items():
            expected = model.get_parameter(name)
            torch.testing.assert_close(values, expected.detach(), rtol=1e-8, atol=1e-10)
            buffer = optimizer.state[expected]["momentum_buffer"]
            torch.testing.assert_close(momentum, buffer, rtol=1e-8, atol=1e-10)
        names |= set(found)
    assert names == {name for name, _ in model.named_parameters()}


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    return LlamaForCausalLM(LlamaConfig(num_key_value_heads=1, **SMALL))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    return BertForMaskedLM(
        BertConfig(hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0, **SMALL)
    )


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2}
    config = T5Config(vocab_size=50, dropout_rate=0.0, decoder_start_token_id=0, **sizes)
    return T5ForConditionalGeneration(config)


SMALL: dict[str, Any] = {
    "vocab_size": 50,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "max_position_embeddings": 16,
    "attn_implementation": "eager",
}
MODELS = {model.__name__: model for model in (llama, bert, t5)}


def model_of(name: str) -> nn.Module:
    torch.manual_seed(0)
    return MODELS[name]().double()


def batches(step: int) -> list[dict[str, torch.Tensor]]:
    """Four micro-batches, with padding at the end of a sequence."""
    generator = torch.Generator().manual_seed(step)
    found = []
    for _ in range(4):
        tokens = torch.randint(3, 50, (2, 6), generator=generator)
        mask = torch.ones_like(tokens)
        mask[1, 4:] = 0
        found.append({"input_ids": tokens, "attention_mask": mask, "labels": tokens})
    return found


def run_transformers(in_parts: bool) -> dict[str, Curve]:
    found = {}
    for name in MODELS:
        engine, *_ = drivetrain.initialize(
            model=model_of(name),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "gradient_accumulation_steps": 4,
                "gradient_clipping": 0.0,
                "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
                "pipeline": {"stages": 2},
                "tensor_parallel": {"autotp_size": 2, "sequence_parallel": in_parts},
            },
        )
        engine.get_global_grad_norm()
        found[name] = [
            (engine.train_batch(iter(batches(step))).item(), engine.get_global_grad_norm())
            for step in range(STEPS)
        ]
        close(engine)
    return found


def expected_curves() -> dict[str, Curve]:
    expected = {}
    for name in MODELS:
        model, curve = model_of(name), []
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        for step in range(STEPS):
            optimizer.zero_grad()
            loss = torch.stack([model(**batch).loss for batch in batches(step)]).mean()
            loss.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
            optimizer.step()
            curve.append((loss.item(), norm.item()))
        expected[name] = curve
    return expected


def test_models_of_transformers_train_as_they_are() -> None:
    expected = expected_curves()
    for found in run_distributed(run_transformers, 4, False, timeout=200):
        for name, curve in expected.items():
            for point, want in zip(found[name], curve, strict=True):
                # these models compute losses in float32
                assert point == pytest.approx(want, rel=2e-6), name


def run_in_parts(stage: int, pipeline: dict[str, Any]) -> tuple[Found, float]:
    """With sequences shared out; also the bytes that a step sent between stages."""
    shared = {"autotp_size": 2, "sequence_parallel": True}
    engine = make(2, 2, 1, stage, pipeline=pipeline, tensor_parallel=shared)
    curve = train(engine, 0, STEPS - 1)
    engine.job.byte_log.reset()
    curve += train(engine, STEPS - 1, STEPS)
    sent = engine.job.byte_log.total(Purpose.ACTIVATION, "pp", Kind.SEND_RECEIVE).sent_bytes
    found = parameters(engine)
    close(engine)
    return (curve, found, 0), sent


@pytest.mark.parametrize(
    ("stage", "pipeline", "messages"),
    [
        pytest.param(0, {}, 1, id="1f1b"),
        pytest.param(3, {"schedule": "interleaved"}, 3, id="interleaved, stage 3"),
        pytest.param(2, {"schedule": "zb_v"}, 2, id="zb_v, stage 2", marks=pytest.mark.long),
        pytest.param(
            1, {"dynamic_shape": True}, 1, id="shapes with each message", marks=pytest.mark.long
        ),
    ],
)
def test_stages_send_the_parts_of_sequences_that_are_shared_out(
    stage: int, pipeline: dict[str, Any], messages: int
) -> None:
    expected, trained = alone(0, STEPS)
    for rank, ((curve, found, _), sent) in enumerate(
        run_distributed(run_in_parts, 4, stage, pipeline, timeout=60)
    ):
        for point, want in zip(curve, expected, strict=True):
            assert point == pytest.approx(want, rel=1e-8)
        for name, values in found.items():
            torch.testing.assert_close(values, trained[name], rtol=1e-8, atol=1e-10)
        tokens = (3, 2)[rank % 2]  # of five
        assert sent == MICRO_BATCHES * messages * ROWS * tokens * WIDTH * 8


def test_models_of_transformers_share_sequences_out_in_stages() -> None:
    expected = expected_curves()
    for found in run_distributed(run_transformers, 4, True, timeout=200):
        for name, curve in expected.items():
            for point, want in zip(found[name], curve, strict=True):
                assert point == pytest.approx(want, rel=2e-6), name


def apart(schedule: str) -> tuple[Found, set[str], int]:
    """Also the weights whose gradients come apart, and how many were computed so in a step."""
    from drivetrain_pipeline.running.runner import PipelineRunner
    from drivetrain_pipeline.running.weights_apart import WeightsApart

    engine = make(2, 2, 1, 1, pipeline={"schedule": schedule})
    kept: list[nn.Parameter] = []
    runner = engine.runner
    assert isinstance(runner, PipelineRunner)
    found = runner._apart
    assert isinstance(found, WeightsApart)
    keep = found.keep

    def counted(weight: nn.Parameter, x: torch.Tensor, gradient: torch.Tensor) -> None:
        kept.append(weight)
        keep(weight, x, gradient)

    found.keep = counted  # type: ignore[method-assign]
    curve = train(engine, 0, STEPS)
    names = {engine.job.parameters.info(p).name for p in kept}
    trained = parameters(engine)
    close(engine)
    return (curve, trained, 0), names, len(kept)


def test_layers_that_are_shared_out_have_their_weights_gradients_apart() -> None:
    expected, trained = alone(0, STEPS)
    every: set[str] = set()
    for (curve, values, _), names, count in run_distributed(apart, 4, "zb_h1", timeout=100):
        for point, want in zip(curve, expected, strict=True):
            assert point == pytest.approx(want, rel=1e-8)
        for name, value in values.items():
            torch.testing.assert_close(value, trained[name], rtol=1e-8, atol=1e-10)
        assert count == len(names) * MICRO_BATCHES * STEPS
        every |= names
    layers = ("attention.q", "attention.k", "attention.v", "attention.o", "gate", "up", "down")
    assert every == {f"blocks.{i}.{layer}.weight" for i in range(BLOCKS) for layer in layers}


def told_in_two_steps(overlap: bool) -> list[str]:
    found: list[str] = []

    class Kept(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            found.append(record.getMessage())

    logging.getLogger("drivetrain.pipeline").addHandler(Kept(logging.WARNING))
    section = {"autotp_size": 2, "tp_overlap_comm": overlap}
    engine = make(2, 2, 1, pipeline={"schedule": "zb_h1"}, tensor_parallel=section)
    train(engine, 0, 2)
    close(engine)
    return found


def test_weights_that_a_schedule_cannot_put_off_are_told_once() -> None:
    told, *others = run_distributed(told_in_two_steps, 4, True, timeout=100)
    # Of two blocks; those at the end of a region do not overlap.
    assert [text.partition(",")[0] for text in told] == ["pipeline: 10 of 14 weights"]
    assert others == [[]] * 3
    assert run_distributed(told_in_two_steps, 4, False, timeout=100)[0] == []
