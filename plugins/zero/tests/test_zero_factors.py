"""Nothing hides a factor of the gradient: gradient descent without clipping, at every stage.

Adam's update is the same for the double of a gradient, and so is a clipped one.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_zero import safe_get_full_grad
from torch import nn
from zero_harness import (
    IN_FORWARD,
    Parameters,
    Run,
    Stage,
    assert_parameters_equal,
    config,
    plain,
    train,
)
from zero_models import BODY, REENTRANT, ROUTED

import drivetrain
from drivetrain.contracts import BucketSpec, Plugin, StateHome, hookimpl
from drivetrain.engine.engine import Engine
from drivetrain.plan.registry import Registry
from drivetrain.states.device_home import DeviceHome
from drivetrain.states.whole import whole
from drivetrain.testing import run_distributed

EACH: dict[str, Any] = {"gradient_reduction": "micro_batch", "reduce_bucket_size": 50}
ONCE: dict[str, Any] = {"gradient_reduction": "boundary", "reduce_bucket_size": 50}
DESCENT = {"type": "SGD", "params": {"lr": 0.1}}


def descent(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.1)


def runs(stage: Stage) -> list[Run]:
    """One micro-batch or several; gradients that come twice, late or never; divided beforehand."""
    cases = [
        (BODY, 1, EACH, {}),
        (BODY, 3, ONCE, {}),
        (REENTRANT, 1, EACH, {}),
        (REENTRANT, 2, EACH, {"gradient_predivide_factor": 4.0}),
        (REENTRANT, 2, ONCE, {"prescale_gradients": True}),
        (ROUTED, 2, EACH, {}),
    ]
    return [
        Run(config(stage, accumulation=n, optimizer=DESCENT, zero=zero, **keys), case, steps=3)
        for case, n, zero, keys in cases
    ]


def train_all(every: list[Run]) -> list[tuple[list[float], Parameters]]:
    return [train(run) for run in every]


@pytest.mark.parametrize(("stage", "world"), [(1, 2), (2, 3), (3, 1), (3, 2), (IN_FORWARD, 2)])
def test_gradients_are_divided_once(stage: Stage, world: int) -> None:
    every = runs(stage)
    answers = run_distributed(train_all, world, every)
    for number, run in enumerate(every):
        losses, parameters = plain(run, world, descent)
        means = [sum(a[number][0][step] for a in answers) / world for step in range(run.steps)]
        assert means == pytest.approx(losses, rel=1e-6), number
        for answer in answers:
            assert_parameters_equal(answer[number][1], parameters)


class Weighted(nn.Module):
    """A loss whose gradient is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(8))

    def forward(self, gradient: torch.Tensor) -> torch.Tensor:
        return (self.weight * gradient).sum()


class Later(DeviceHome):
    """Carries out an update when the next one is asked for, or when it is told to finish."""

    _asked: Any = None

    def update(self, gradient: torch.Tensor, hyper: Any, scale: Any) -> None:
        self.flush()
        self._asked = gradient.clone(), dict(hyper), scale

    def flush(self) -> None:
        asked, self._asked = self._asked, None
        if asked is not None:
            super().update(*asked)


class LaterPlaces(Plugin):
    name = "later_places"

    @hookimpl
    def place_state(self, specs: Sequence[BucketSpec]) -> Sequence[StateHome]:
        return [Later(spec) for spec in specs]


def engine_of(stage: int, **keys: Any) -> Engine:
    settings = config(stage, optimizer={"type": "SGD", "params": {"lr": 1.0}}, **keys)
    engine, *_ = drivetrain.initialize(
        model=Weighted(),
        config={**settings, "train_micro_batch_size_per_gpu": 1},
        registry=Registry.installed().with_plugins(LaterPlaces),
    )
    return engine


def whole_weight(engine: Engine) -> list[float]:
    with whole(engine.module):
        found: list[float] = engine.module.weight.tolist()
    return found


def read_before_a_second_backward(stage: int) -> list[float]:
    """Reading a gradient reduces it, over replicas too; what comes after is reduced on its own."""
    engine = engine_of(stage, zero={"mics_shard_size": 2, **ONCE})
    own = torch.full((8,), 1.0 + engine.job.rank)
    engine.backward(engine(own))
    safe_get_full_grad(engine.module.weight)
    engine.backward(engine(own))
    engine.step()
    found = whole_weight(engine)
    engine.destroy()
    return found


def summed_locally_before_it_travels(stage: int) -> list[float]:
    """What is too small for the dtype on the wire adds up before it is rounded to that."""
    engine = engine_of(stage, communication_data_type="bf16")
    with engine.no_sync():
        for size in (256.0, *[1.0] * 7):
            engine.backward(engine(torch.full((8,), size)))
    engine.backward(engine(torch.ones(8)))
    engine.step()
    found = whole_weight(engine)
    engine.destroy()
    return found


def saved_while_updates_wait(stage: int, folder: str) -> list[float]:
    engine = engine_of(stage, plugins={"later_places": True})
    for _ in range(2):
        engine.backward(engine(torch.ones(8)))
        engine.step()
    engine.save_checkpoint(folder)
    engine.destroy()
    engine = engine_of(stage)
    engine.load_checkpoint(folder)
    found = whole_weight(engine)
    engine.destroy()
    return found


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_after_a_look_at_them_reach_every_replica(stage: int) -> None:
    for found in run_distributed(read_before_a_second_backward, 4, stage):
        assert found == [-2 * (1 + 2 + 3 + 4) / 4] * 8


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_gradients_of_a_window_are_rounded_once(stage: int) -> None:
    for found in run_distributed(summed_locally_before_it_travels, 2, stage):
        assert found == [-264.0] * 8


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_a_save_waits_for_updates_that_a_home_has_put_off(stage: int, tmp_path: Path) -> None:
    for found in run_distributed(saved_while_updates_wait, 2, stage, str(tmp_path)):
        assert found == [-2.0] * 8
