"""1-bit Adam after its warm-up: the weights are those of the paper's algorithm in float64."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from drivetrain_onebit.compression import chunk_size
from torch import nn

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.testing import run_distributed

SIDE, FREEZE, STEPS = 8, 6, 14
RATE, BETA1, BETA2, EPS, DECAY = 1e-2, 0.9, 0.95, 1e-3, 0.1
KEPT_COLUMNS = [1.0] * (SIDE - 1) + [0.0]
CASES = [(accumulation, masked) for accumulation in (1, 2) for masked in (False, True)]


def gradient(step: int, rank: int, micro_step: int) -> np.ndarray:
    """Two elements have none during the warm-up, so that their second moment is frozen at 0."""
    seed = 1000 * step + 10 * rank + micro_step
    values = np.random.default_rng(seed).standard_normal((SIDE, SIDE))
    if step < FREEZE:
        values[0, :2] = 0.0
    return values


class Linear(nn.Module):
    """A loss whose gradient is its input."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.linspace(-1, 1, SIDE * SIDE).view(SIDE, SIDE))

    def forward(self, gradient: torch.Tensor) -> torch.Tensor:
        return (self.weight * gradient).sum()


def trained(accumulation: int, masked: bool) -> np.ndarray:
    params = {
        "lr": RATE,
        "betas": [BETA1, BETA2],
        "eps": EPS,
        "weight_decay": DECAY,
        "freeze_step": FREEZE,
    }
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": accumulation,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "OneBitAdam", "params": params},
    }
    module = Linear()
    engine, *_ = drivetrain.initialize(model=module, config=config)
    if masked:
        assert engine.optimizer is not None
        engine.optimizer.param_groups[0]["exp_avg_mask"] = torch.tensor(KEPT_COLUMNS)
    for step in range(STEPS):
        for micro_step in range(accumulation):
            given = gradient(step, Ranks.current().rank, micro_step)
            engine.backward(engine(torch.tensor(given, dtype=torch.float32)))
            engine.step()
    weight = module.weight.detach().double().numpy().copy()
    engine.destroy()
    return weight


def all_cases() -> list[np.ndarray]:
    return [trained(*case) for case in CASES]


class OnePerRank:
    """Compression with error feedback, of all ranks at once, in float64."""

    def __init__(self, world: int, numel: int) -> None:
        self.world, self.chunk = world, chunk_size(numel, world)
        self.worker_errors = np.zeros((world, numel))
        self.server_errors = np.zeros((world, self.chunk))

    def mean(self, momenta: np.ndarray) -> np.ndarray:
        values = momenta + self.worker_errors
        sent = np.stack([signs_of(value) for value in values])
        self.worker_errors = values - sent
        mean = sent.mean(axis=0)
        for rank in range(self.world):
            part = mean[rank * self.chunk : (rank + 1) * self.chunk]
            if len(part):
                value = part + self.server_errors[rank, : len(part)]
                part[:] = signs_of(value)
                self.server_errors[rank, : len(part)] = value - part
        return mean


def signs_of(values: np.ndarray) -> np.ndarray:
    scale = np.linalg.norm(values) / np.sqrt(len(values))
    return np.where(values >= 0, scale, -scale)


def by_the_paper(world: int, accumulation: int, masked: bool) -> np.ndarray:
    """Tang et al. 2021, algorithm 1."""
    numel = SIDE * SIDE
    weight = np.linspace(-1, 1, numel).astype(np.float32).astype(np.float64)
    momentum, variance = np.zeros(numel), np.zeros(numel)
    compression = OnePerRank(world, numel)
    mask = np.tile(KEPT_COLUMNS, SIDE) if masked else np.ones(numel)
    for step in range(STEPS):
        own = np.stack(
            [
                sum(gradient(step, rank, m) for m in range(accumulation)).ravel() / accumulation
                for rank in range(world)
            ]
        )
        if step < FREEZE:
            mean = own.mean(axis=0)
            momentum = BETA1 * momentum + (1 - BETA1) * mean
            variance = BETA2 * variance + (1 - BETA2) * mean**2
        else:
            momentum = compression.mean(BETA1 * momentum + (1 - BETA1) * own)
            momentum = np.where(variance == 0, 0.0, momentum) * mask
        weight = weight * (1 - RATE * DECAY) - RATE * momentum / (np.sqrt(variance) + EPS)
    return weight.reshape(SIDE, SIDE)


@pytest.mark.parametrize("world", [2, 3])
def test_weights_after_the_freeze_are_those_of_the_algorithm(world: int) -> None:
    expected = [by_the_paper(world, *case) for case in CASES]
    for answers in run_distributed(all_cases, world):
        for case, answer, reference in zip(CASES, answers, expected, strict=True):
            assert np.abs(answer - reference).max() < 1e-5, case


def test_the_mask_and_the_freeze_change_what_is_learned() -> None:
    """Else the comparison above would say nothing about them."""
    plain, masked = by_the_paper(2, 1, False), by_the_paper(2, 1, True)
    assert np.abs(plain - masked).max() > 1e-2
