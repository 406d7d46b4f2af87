"""Models without memory go into shards one submodule after another."""

from __future__ import annotations

import gc
from typing import Any
from unittest.mock import patch

import pytest
import torch
from drivetrain_zero.init import shards
from torch import nn

import drivetrain
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.testing import data, run_distributed
from drivetrain.testing.models import TinyGPT

SIZES: dict[str, int] = {"vocabulary": 64, "width": 32, "layers": 4}
LARGEST = 4 * 4 * 32 * 32
"""Bytes of the weight of a layer that widens four times."""


def config(stage: int, ranks: int) -> dict[str, Any]:
    return {
        "train_batch_size": ranks * 2,
        "gradient_clipping": 0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
        "seed": 5,
    }


def empty() -> nn.Module:
    with torch.device("meta"):
        return TinyGPT(**SIZES, tied=True)


def held() -> int:
    """Bytes of all tensors of this process that have memory."""
    gc.collect()
    storages = {
        tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes()
        for tensor in gc.get_objects()
        if isinstance(tensor, torch.Tensor) and not tensor.is_meta
    }
    return sum(storages.values())


def train(stage: int) -> tuple[list[float], int, int]:
    """Losses, and bytes of the model and of the most that was held while it was made."""
    most, before = [0], held()
    keep = shards.keep_in_shards

    def noted(job: Job, part: nn.Module) -> None:
        most.append(held() - before)
        keep(job, part)
        most.append(held() - before)

    ranks = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 2
    with patch.object(shards, "keep_in_shards", noted):
        engine, *_ = drivetrain.initialize(model=empty(), config=config(stage, ranks))
    size = sum(parameter.numel() * 4 for parameter in engine.module.parameters())
    rank, losses = engine.job.rank, []
    for step in range(3):
        inputs, targets = (t[4 * step :][:4].chunk(2)[rank] for t in data.tokens(12))
        loss = engine(inputs, targets)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    assert engine.module.head.weight is engine.module.tokens.weight
    engine.destroy()
    return losses, size, max(most)


def plain() -> list[float]:
    """The same in one process, with values that one rank alone has made."""
    module = empty()
    with Job.open(Plan.build(config(0, 1), world_size=1)) as job:
        drivetrain.materialize(module, job=job)
    optimizer, losses = torch.optim.SGD(module.parameters(), lr=0.5), []
    for step in range(3):
        loss = module(*(t[4 * step :][:4] for t in data.tokens(12)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


@pytest.mark.parametrize("stage", [1, 3])
def test_a_model_without_memory_trains_like_one_process(stage: int) -> None:
    ends = run_distributed(train, 2, stage)
    means = torch.tensor([losses for losses, *_ in ends]).mean(0)
    torch.testing.assert_close(means, torch.tensor(plain()), rtol=1e-5, atol=0)
    for _, size, most in ends:
        if stage == 3:
            assert 0 < most < size / 2 + 3 * LARGEST < 0.8 * size
