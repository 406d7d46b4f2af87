"""An engine over parameters that another engine keeps in shards neither frees nor trains them."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import nn
from zero_harness import SGD, config

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.errors import ConfigError
from drivetrain.testing import run_distributed

ALIKE = {"optimizer": SGD}


def layers(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Sequential(*[nn.Linear(6, 6) for _ in range(3)])


def engine_of(module: nn.Module, stage: int, **changes: Any) -> Engine:
    settings = config(stage, **{**ALIKE, **changes})
    return drivetrain.initialize(model=module, config=settings)[0]


@contextmanager
def closing(*engines: Engine) -> Iterator[None]:
    yield
    for engine in engines:
        engine.destroy()
        engine.job.close()


def train_twice(stage: int) -> str:
    module = layers()
    first = engine_of(module, stage)
    outer = nn.Sequential(nn.Linear(6, 6), module)
    with closing(first), pytest.raises(ConfigError) as refused:
        engine_of(outer, stage)
    return str(refused.value)


@pytest.mark.parametrize("stage", [1, 3])
def test_each_rank_is_told_which_parameter_another_engine_trains(stage: int) -> None:
    for message in run_distributed(train_twice, 2, stage):
        assert "parameter 1.0.weight is kept by another engine (number 0 of another job" in message
        assert "call destroy() on that engine first" in message


def serve_what_is_trained() -> None:
    module = layers()
    first = engine_of(module, 3)
    with closing(first):
        with pytest.raises(ConfigError, match=r"parameter 0\.weight is kept in shards by another"):
            drivetrain.initialize(model=module, config={"train_micro_batch_size_per_gpu": 1})
        x = torch.ones(2, 6)
        expected = layers()(x)
        torch.testing.assert_close(first(x), expected)


def test_an_engine_that_would_free_what_another_keeps_in_shards_is_refused() -> None:
    run_distributed(serve_what_is_trained, 2)
