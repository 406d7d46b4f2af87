"""A sharded parameter that is used where it is not whole is named; so is a scripted module."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError, TrainingError
from drivetrain.testing import run_distributed

CONFIG = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


def model(scripted: bool = False) -> nn.Module:
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(2)]
    head = nn.Sequential(nn.Linear(4, 4))
    return nn.Sequential(*blocks, torch.jit.script(head) if scripted else head)


def penalty(module: Any, x: torch.Tensor) -> torch.Tensor:
    return sum(parameter.square().sum() for parameter in module.parameters())


def of_a_block(module: Any, x: torch.Tensor) -> torch.Tensor:
    return (x @ module[1][0].weight).sum()


def of_a_block_as_a_number(module: Any, x: torch.Tensor) -> torch.Tensor:
    return x.sum() * module[0][0].bias.detach().norm()


def of_the_root(module: Any, x: torch.Tensor) -> torch.Tensor:
    return (x @ module[2][0].weight).sum()


USES: dict[Callable[..., torch.Tensor], str] = {
    penalty: "2.0.",
    of_a_block: "1.0.weight",
    of_a_block_as_a_number: "0.0.bias",
    of_the_root: "2.0.weight",
}


def names_what_was_used() -> None:
    x = torch.ones(1, 4)
    for use, name in USES.items():
        engine, *_ = drivetrain.initialize(model=model(), config=CONFIG)
        for trains in (False, True):
            if trains:
                engine.backward(engine(x).sum())
                engine.step()
            use(engine.module, x)  # nothing comes of it
        engine.backward(engine(x).sum())
        engine.step()
        used = use(engine.module, x)
        engine.backward(engine(x).sum() + used)
        with pytest.raises(TrainingError, match=rf"nan.*parameter {name}.*drivetrain\.whole\("):
            engine.step()
        engine.destroy()


def names_nothing_else() -> None:
    engine, *_ = drivetrain.initialize(model=model(), config=CONFIG)
    engine.backward(engine(torch.full((1, 4), torch.nan)).sum())
    with pytest.raises(TrainingError, match=r"nan: parameters were not updated from it$"):
        engine.step()
    engine.destroy()


def refuses_scripted_modules() -> None:
    with pytest.raises(ConfigError, match=r"module 2 was made by torch\.jit.*stage 2"):
        drivetrain.initialize(model=model(scripted=True), config=CONFIG)


def test_what_was_used_where_it_is_sharded_is_named() -> None:
    run_distributed(both, 2)


def both() -> None:
    names_what_was_used()
    names_nothing_else()
    refuses_scripted_modules()
