"""Nothing hides a factor of the gradient: gradient descent without clipping, at every stage.

Adam's update is the same for the double of a gradient, and so is a clipped one.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
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
