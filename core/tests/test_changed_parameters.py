"""Parameters that scripts change behind the engine: kept, or refused by name, never undone."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.errors import TrainingError
from drivetrain.job.job import open_jobs

BF16 = {"bf16": {"enabled": True}}


@pytest.fixture(autouse=True)
def jobs_are_closed() -> Iterator[None]:
    yield
    for job in open_jobs()[::-1]:
        job.close()


def engine_of(**config: Any) -> Engine:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 1))
    config = {"train_batch_size": 4, "optimizer": {"type": "SGD", "params": {"lr": 0.0}}, **config}
    return drivetrain.initialize(model=module, config=config)[0]


def step(engine: Engine) -> None:
    x = torch.ones(4, 4, dtype=next(engine.module.parameters()).dtype)
    engine.backward(engine(x).float().sum())
    engine.step()


def twos(engine: Engine) -> dict[str, torch.Tensor]:
    return {name: torch.full_like(value, 2.0) for name, value in engine.module.state_dict().items()}


def assert_twos(engine: Engine) -> None:
    assert all(bool((parameter == 2.0).all()) for parameter in engine.module.parameters())


def test_a_change_in_place_is_kept_where_parameters_are_their_own_masters() -> None:
    engine = engine_of()
    engine.module.load_state_dict(twos(engine))
    step(engine)
    assert_twos(engine)
    with torch.no_grad():
        engine.module[0].weight.clamp_(max=1.0)
    step(engine)
    assert bool((engine.module[0].weight == 1.0).all())


def test_a_change_that_masters_would_undo_is_refused_by_name() -> None:
    engine = engine_of(**BF16)
    step(engine)
    engine.module.load_state_dict(twos(engine))
    message = r"parameter \d\.\w+ was changed in place .* engine\.load_module_state_dict\(\)"
    with pytest.raises(TrainingError, match=message):
        step(engine)


@pytest.mark.parametrize("way", ["engine", "refresh"])
def test_a_change_that_masters_are_told_of_is_kept(way: str) -> None:
    engine = engine_of(**BF16)
    step(engine)
    if way == "engine":
        engine.load_module_state_dict(twos(engine))
    else:
        engine.module.load_state_dict(twos(engine))
        engine.states.refresh()
    step(engine)
    assert_twos(engine)


@pytest.mark.parametrize(
    ("config", "cast", "message"),
    [
        ({}, torch.bfloat16, r"cast from torch\.float32 to torch\.bfloat16"),
        (BF16, torch.float32, r"cast from torch\.bfloat16 to torch\.float32"),
    ],
)
def test_a_cast_after_which_updates_would_not_be_seen_is_refused_by_name(
    config: dict[str, Any], cast: torch.dtype, message: str
) -> None:
    engine = engine_of(**config)
    step(engine)
    engine.module.to(cast)
    with pytest.raises(TrainingError, match=r"parameter \d\.\w+ was " + message):
        step(engine)
