"""Parameters that scripts change behind ZeRO's back: refused by name, or kept by all ranks."""

from __future__ import annotations

import pytest
import torch
from drivetrain_zero import safe_get_full_fp32_param
from torch import nn

import drivetrain
from drivetrain.contracts import Purpose, Tag
from drivetrain.engine.engine import Engine
from drivetrain.errors import TrainingError
from drivetrain.testing import run_distributed

TAG = Tag(Purpose.CONTROL, site="test")


def engine_of(stage: int, *, bf16: bool = True) -> Engine:
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "bf16": {"enabled": bf16},
        "optimizer": {"type": "SGD", "params": {"lr": 0.0}},
        "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
    }
    return drivetrain.initialize(model=nn.Linear(5, 3), config=config)[0]


def step(engine: Engine) -> None:
    dtype = engine.module.weight.dtype
    engine.backward(engine(torch.ones(4, 5, dtype=dtype)).float().sum())
    engine.step()


@torch.no_grad()
def fill(engine: Engine) -> None:
    for parameter in engine.module.parameters():
        parameter.fill_(2.0)


def change(engine: Engine, write_rank: int | None) -> None:
    with drivetrain.whole(engine.module, write_rank=write_rank):
        fill(engine)


def assert_twos(engine: Engine) -> None:
    with drivetrain.whole(engine.module):
        assert all(bool((p == 2.0).all()) for p in engine.module.parameters())


def changed_without_a_word(stage: int) -> None:
    engine = engine_of(stage)
    step(engine)
    fill(engine)
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
    """The block itself tells masters."""
    for stage in (0, 1, 2, 3):
        engine = engine_of(stage)
        step(engine)
        change(engine, write_rank=0)
        step(engine)
        assert_twos(engine)
        change(engine, write_rank=0)  # to what they are: no change, nor one in place
        step(engine)
        assert_twos(engine)
        engine.job.close()


@pytest.mark.parametrize(("stage", "world"), [(1, 1), (2, 2), (3, 1)])
def test_a_change_that_masters_would_undo_is_refused_by_name(stage: int, world: int) -> None:
    run_distributed(changed_without_a_word, world, stage)


@pytest.mark.parametrize(("stage", "world"), [(1, 1), (2, 2), (3, 1), (3, 2)])
def test_a_change_that_masters_are_told_of_is_kept(stage: int, world: int) -> None:
    run_distributed(changed_and_told, world, stage)


@pytest.mark.parametrize("world", [1, 2])
def test_a_change_inside_a_block_that_gathers_for_writing_is_kept_without_more(world: int) -> None:
    run_distributed(changed_whole, world)


# -- one rank's values on all ----------------------------------------------------------------------


def drawn(parameter: nn.Parameter) -> None:
    with torch.no_grad():
        nn.init.normal_(parameter)


def drawn_through_data(parameter: nn.Parameter) -> None:
    parameter.data.copy_(torch.randn_like(parameter))


def drawn_elsewhere(parameter: nn.Parameter) -> None:
    parameter.data = torch.randn_like(parameter)


def turned_round(parameter: nn.Parameter) -> None:
    parameter.data.copy_(parameter.data.flip(0))


def values_of(engine: Engine) -> torch.Tensor:
    with drivetrain.whole(engine.module):
        return torch.cat([p.detach().float().flatten() for p in engine.module.parameters()])


def masters_of(engine: Engine) -> torch.Tensor:
    found = [safe_get_full_fp32_param(p) for p in engine.module.parameters()]
    return torch.cat([value.flatten() for value in found if value is not None])


def one_rank_writes(stage: int, bf16: bool) -> None:
    engine = engine_of(stage, bf16=bf16)
    rank = engine.job.rank
    for writer, write in enumerate([drawn, drawn_through_data, drawn_elsewhere, turned_round]):
        torch.manual_seed(rank + 10)
        with drivetrain.whole(engine.module, write_rank=writer % 2):
            for parameter in engine.module.parameters():
                write(parameter)
            wanted = torch.cat([p.detach().flatten() for p in engine.module.parameters()])
        wanted = wanted.clone()
        engine.job.communicator.broadcast(wanted, "data", TAG, source=writer % 2)
        assert torch.equal(values_of(engine), wanted.float()), write
        assert torch.equal(masters_of(engine), wanted.float()), write
        step(engine)  # at rate 0
        assert torch.equal(values_of(engine), wanted.float()), write
    with pytest.raises(TrainingError, match="changed on rank 1, but modifier_rank"):
        writes_on_rank_1(engine)
    engine.job.close()


def writes_on_rank_1(engine: Engine) -> None:
    with drivetrain.whole([engine.module.weight], write_rank=0):
        if engine.job.rank == 1:
            drawn(engine.module.weight)


def one_rank_writes_everywhere() -> None:
    for stage in (0, 1, 2, 3):
        for bf16 in (False, True):
            one_rank_writes(stage, bf16)


def test_what_one_rank_writes_is_there_on_all_at_every_stage() -> None:
    run_distributed(one_rank_writes_everywhere, 2)
