"""A job that shrinks from 4 ranks to 3 to 2 and grows again sees every sample once an epoch."""

from __future__ import annotations

import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from drivetrain_elasticity import resume
from drivetrain_elasticity.keeper import OWNER
from torch import nn

import drivetrain
from drivetrain.testing import data, run_distributed
from drivetrain.testing.models import mlp

SAMPLES, BATCH, EPOCH = 48, 12, 4
"""Samples, samples of a step, and steps of an epoch."""


class Recording(nn.Module):
    """A model that keeps the numbers of the samples it has seen; they are in their first input."""

    def __init__(self) -> None:
        super().__init__()
        self.model = mlp()
        self.seen: list[int] = []

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        self.seen += (inputs[:, 0] * SAMPLES).round().int().tolist()
        return self.model(inputs, targets)


@pytest.fixture
def owners() -> Iterator[list[str]]:
    """Two processes that a keeper belongs to, which ends with them."""
    command = [sys.executable, "-c", "input()"]
    processes = [subprocess.Popen(command, stdin=subprocess.PIPE) for _ in range(2)]
    yield [str(process.pid) for process in processes]
    for process in processes:
        process.communicate(b"\n")


def trained(until: int, stage: int) -> tuple[int, list[int], list[float], dict[str, torch.Tensor]]:
    """First step, samples that this rank has seen, losses, weights at the end."""
    inputs, targets = data.vectors(SAMPLES)
    inputs[:, 0] = torch.arange(SAMPLES) / SAMPLES
    config: dict[str, Any] = {
        "elasticity": {
            "enabled": True,
            "micro_batch_sizes": [1, 2, 3],
            "max_train_batch_size": BATCH,
        },
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": stage},
        "survival": {"every": 1},
    }
    samples = list(zip(inputs, targets, strict=True))
    engine = drivetrain.initialize(model=Recording(), config=config, training_data=samples)[0]
    resume(engine)
    start = engine.global_steps
    losses = [float(engine.train_batch()) for _ in range(until - start)]
    weights = engine.module_state_dict()
    seen = list(engine.module.seen)
    engine.job.close()
    return start, seen, losses, weights


@pytest.mark.parametrize("stage", [2, pytest.param(3, marks=pytest.mark.long)])
def test_each_sample_once_an_epoch_and_the_weights_of_an_unbroken_run(
    owners: list[str], stage: int
) -> None:
    epochs = [Counter[int](), Counter[int]()]
    losses: list[float] = []
    for ranks, until in ((4, 2), (3, 3), (2, 6), (4, 8)):  # the second one ends amid an epoch
        found = run_distributed(trained, ranks, until, stage, env={OWNER: owners[0]})
        assert {start for start, *_ in found} == {len(losses)}
        for start, seen, _, _ in found:
            share = len(seen) // (until - start)
            for step in range(start, until):
                at = (step - start) * share
                epochs[step // EPOCH].update(seen[at : at + share])
        losses += found[0][2]
    for epoch in epochs:
        assert epoch == Counter(range(SAMPLES))
    _, _, expected, weights = run_distributed(trained, 4, 8, stage, env={OWNER: owners[1]})[0]
    assert losses == pytest.approx(expected, rel=1e-5)
    for name, value in weights.items():
        torch.testing.assert_close(found[0][3][name], value, rtol=1e-4, atol=1e-5)
