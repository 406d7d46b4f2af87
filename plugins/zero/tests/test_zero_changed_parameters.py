"""Parameters that scripts change behind ZeRO's back: refused by name, or kept by all ranks."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.engine import Engine
from drivetrain.errors import TrainingError
from drivetrain.testing import run_distributed


def engine_of(stage: int) -> Engine:
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": True},
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    return drivetrain.initialize(model=nn.Linear(5, 3), config=config)[0]


def step(engine: Engine) -> None:
    engine.backward(engine(torch.ones(4, 5, dtype=torch.bfloat16)).float().sum())
    engine.step()


def change(engine: Engine, write_rank: int | None) -> None:
    with drivetrain.whole(engine.module, write_rank=write_rank), torch.no_grad():
        for parameter in engine.module.parameters():
            parameter.fill_(2.0)


def assert_twos(engine: Engine) -> None:
    with drivetrain.whole(engine.module):
        assert all(bool((p == 2.0).all()) for p in engine.module.parameters())


def changed_without_a_word(stage: int) -> None:
    engine = engine_of(stage)
    step(engine)
    change(engine, write_rank=0)
    with pytest.raises(TrainingError, match=r"parameter \w+ was changed in place after"):
        step(engine)


def changed_and_told(stage: int) -> None:
    engine = engine_of(stage)
    step(engine)
    change(engine, write_rank=0)
    engine.states.refresh()
    step(engine)
    assert_twos(engine)


def changed_whole() -> None:
    """Where parameters are sharded, the block itself tells masters."""
    engine = engine_of(3)
    step(engine)
    change(engine, write_rank=0)
    step(engine)
    assert_twos(engine)


@pytest.mark.parametrize(("stage", "world"), [(1, 1), (2, 2), (3, 1)])
def test_a_change_that_masters_would_undo_is_refused_by_name(stage: int, world: int) -> None:
    run_distributed(changed_without_a_word, world, stage)


@pytest.mark.parametrize(("stage", "world"), [(1, 1), (2, 2), (3, 1), (3, 2)])
def test_a_change_that_masters_are_told_of_is_kept(stage: int, world: int) -> None:
    run_distributed(changed_and_told, world, stage)


def test_a_change_inside_a_block_that_gathers_for_writing_is_kept_without_more() -> None:
    run_distributed(changed_whole, 2)
