"""Compressed collectives under plugins that know nothing of them."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from gpt_with_experts import gpt_with_experts

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.contracts import Kind, Purpose
from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan
from drivetrain.testing import run_distributed
from drivetrain.testing.models import mlp

STEPS = 40


def with_zero(stage: int, how: dict[str, Any] | None) -> tuple[list[float], float]:
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2}},
        "zero_optimization": {"stage": stage},
    }
    if how is not None:
        gradients = {"minimum_bytes": 0, "block": 64, **how}
        config["communication"] = {"compress": {"gradients": gradients}}
    engine, *_ = drivetrain.initialize(model=mlp(), config=config)
    losses = []
    for step in range(STEPS):
        generator = torch.Generator().manual_seed(1000 * step + Ranks.current().rank)
        inputs = torch.randn(4, 8, generator=generator)
        loss = engine(inputs, inputs.roll(1, dims=1))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    sent = engine.job.byte_log.total(Purpose.GRADIENT).sent_bytes
    engine.destroy()
    return losses, sent


def with_experts(compress: dict[str, Any]) -> tuple[list[float], float]:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "moe": {"ep_size": 2},
        "communication": {"compress": compress},
    }
    torch.manual_seed(5)
    engine, *_ = drivetrain.initialize(model=gpt_with_experts(), config=config)
    losses = []
    for step in range(6):
        seed = 1000 * step + Ranks.current().rank
        ids = torch.randint(32, (2, 9), generator=torch.Generator().manual_seed(seed))
        loss = engine(ids[:, :-1], ids[:, 1:])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    moved = engine.job.byte_log.total(Purpose.ACTIVATION, op=Kind.ALL_TO_ALL).payload_bytes
    engine.destroy()
    return losses, moved


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_each_stage_of_zero_train_on_in_a_third_of_the_bytes(stage: int) -> None:
    plain = run_distributed(with_zero, 2, stage, None)
    for how in ({"method": "int8"}, {"method": "int4", "error_feedback": True}):
        answers = run_distributed(with_zero, 2, stage, how)
        for (losses, sent), (exact, whole) in zip(answers, plain, strict=True):
            assert sum(losses[-10:]) == pytest.approx(sum(exact[-10:]), rel=0.05)
            assert sent < whole / 3


def test_tokens_of_experts_travel_in_fewer_bytes() -> None:
    plain = run_distributed(with_experts, 2, {"activations": {"method": "int8"}})
    answers = run_distributed(with_experts, 2, {"experts": {"method": "fp8_e4m3", "block": 32}})
    for (losses, moved), (exact, whole) in zip(answers, plain, strict=True):
        assert losses == pytest.approx(exact, rel=0.02)
        assert losses != exact
        assert moved < whole / 2


@pytest.mark.parametrize(
    ("zero", "compress", "message"),
    [
        ({"zero_quantized_gradients": True}, "gradients", "both quantise the same numbers"),
        ({}, "weights", "zero_quantized_weights keeps them"),
    ],
)
def test_compressing_twice_is_refused(zero: dict[str, Any], compress: str, message: str) -> None:
    config = {
        "train_batch_size": 2,
        "zero_optimization": {"stage": 3, **zero},
        "communication": {"compress": {compress: {"method": "int8"}}},
    }
    with pytest.raises(ConfigError, match=message):
        Plan.build(config, world_size=2)
