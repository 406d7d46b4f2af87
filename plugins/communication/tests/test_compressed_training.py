"""Training with compressed gradients: near the plain run, resumed exactly, refused where wrong."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.contracts import Purpose
from drivetrain.engine.engine import Engine
from drivetrain.errors import ConfigError
from drivetrain.plan.plan import Plan
from drivetrain.testing import run_distributed
from drivetrain.testing.models import mlp

STEPS = 60
METHODS: dict[str, dict[str, Any]] = {
    "int8": {"method": "int8"},
    "int4": {"method": "int4", "error_feedback": True, "block": 32},
    "fp8_e4m3": {"method": "fp8_e4m3", "error_feedback": True},
    "powersgd": {"method": "powersgd", "rank": 4},
    "top_k": {"method": "top_k", "density": 0.1},
}


def make(gradients: dict[str, Any] | None, optimizer: str = "AdamW") -> Engine:
    module = mlp()
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_clipping": 0.0,
        "optimizer": {"type": optimizer, "params": {"lr": 1e-2 if optimizer == "AdamW" else 1.0}},
    }
    if gradients is not None:
        config["communication"] = {"compress": {"gradients": {"minimum_bytes": 0, **gradients}}}
    engine, *_ = drivetrain.initialize(model=module, config=config)
    return engine


def train(engine: Engine, steps: range) -> list[float]:
    losses = []
    for step in steps:
        generator = torch.Generator().manual_seed(1000 * step + Ranks.current().rank)
        inputs = torch.randn(4, 8, generator=generator)
        loss = engine(inputs, inputs.roll(1, dims=1))
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def weights(engine: Engine) -> torch.Tensor:
    return nn.utils.parameters_to_vector(engine.module.parameters()).detach().clone()


def trained(method: str | None, optimizer: str) -> tuple[list[float], torch.Tensor, float]:
    engine = make(METHODS[method] if method else None, optimizer)
    losses = train(engine, range(STEPS))
    sent = engine.job.byte_log.total(Purpose.GRADIENT).sent_bytes / STEPS
    answer = losses, weights(engine), sent
    engine.destroy()
    return answer


def all_trained(methods: list[str | None], optimizer: str) -> list[Any]:
    return [trained(method, optimizer) for method in methods]


def both_ways(methods: list[str], folder: str) -> list[torch.Tensor]:
    """Weights of unbroken runs, then of those that were resumed."""
    return [resumed(method, f"{folder}/{method}", stop) for stop in (None, 7) for method in methods]


def resumed(method: str, folder: str, stop: int | None) -> torch.Tensor:
    engine = make(METHODS[method])
    if stop is not None:
        train(engine, range(stop))
        engine.save_checkpoint(folder)
        engine.destroy()
        engine = make(METHODS[method])
        engine.load_checkpoint(folder)
    train(engine, range(stop or 0, 12))
    answer = weights(engine)
    engine.destroy()
    return answer


def loaded_elsewhere(folder: str) -> bool:
    engine = make(METHODS["int4"])
    engine.load_checkpoint(folder)
    losses = train(engine, range(3))
    engine.destroy()
    return all(torch.isfinite(torch.tensor(losses)))


def ends(answers: Sequence[Any]) -> list[list[float]]:
    return [losses[-20:] for losses, *_ in answers]


def _mean(rows: list[list[float]]) -> float:
    return sum(map(sum, rows)) / sum(map(len, rows))


@pytest.mark.parametrize("optimizer", ["AdamW", "SGD"])
def test_compressed_gradients_train_nearly_as_plain_ones(optimizer: str) -> None:
    runs: list[str | None] = [None, *METHODS]
    plain, *others = zip(*run_distributed(all_trained, 2, runs, optimizer), strict=True)
    begin, end = _mean([losses[:5] for losses, *_ in plain]), _mean(ends(plain))
    assert end < 0.9 * begin
    for method, answers in zip(METHODS, others, strict=True):
        assert torch.equal(answers[0][1], answers[1][1])
        share = 0.1 if method in ("int8", "int4", "fp8_e4m3") else 0.4
        assert _mean(ends(answers)) < end + share * (begin - end), method
        assert answers[0][2] < plain[0][2], method  # bytes


def test_a_resumed_run_has_the_bits_of_an_unbroken_one(tmp_path: Path) -> None:
    methods = ["int4", "powersgd", "top_k"]
    for found in run_distributed(both_ways, 2, methods, str(tmp_path)):
        for method, unbroken, again in zip(methods, found[:3], found[3:], strict=True):
            assert torch.equal(unbroken, again), method


def test_on_another_number_of_ranks_errors_start_from_zero(tmp_path: Path) -> None:
    run_distributed(resumed, 2, "int4", str(tmp_path), 7)
    assert run_distributed(loaded_elsewhere, 3, str(tmp_path)) == [True] * 3


@pytest.mark.parametrize(
    ("compress", "message"),
    [
        ({"gradients": {"method": "int9"}}, "method"),
        ({"gradients": {"method": "top_k", "error_feedback": False}}, "does not converge"),
        ({"weights": {"method": "powersgd"}}, "method"),
        ({"experts": {"method": "int8", "error_feedback": True}}, "for gradients"),
        ({"gradients": {"method": "int8", "block": 3}}, "block"),
        ({"gradients": {"method": "top_k", "density": 2.0}}, "density"),
        ({"gradient": {"method": "int8"}}, "gradient"),
    ],
)
def test_wrong_sections_are_refused(compress: dict[str, Any], message: str) -> None:
    config = {"train_batch_size": 1, "communication": {"compress": compress}}
    with pytest.raises(ConfigError, match=message):
        Plan.build(config, world_size=1)
