"""Ranks that build different models are told so: the name of a parameter and both values."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.errors import ConfigError
from drivetrain.testing import run_distributed


def net(head: int = 8) -> nn.Sequential:
    return nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8), nn.Linear(8, head))


def frozen(module: nn.Module) -> nn.Module:
    module[0].requires_grad_(False)
    return module


def deeper(module: nn.Module) -> nn.Module:
    module.append(nn.Linear(4, 4))
    return module


def other_buffer(module: nn.Module) -> nn.Module:
    module[1].running_mean = torch.zeros(9)
    return module


def other_order() -> nn.Module:
    first, second = nn.Module(), nn.Module()
    for module, names in ((first, "ab"), (second, "ba")):
        for name in names:
            module.register_parameter(name, nn.Parameter(torch.zeros(3)))
    return second if Ranks.current().rank else first


def sparse(entries: int) -> nn.Module:
    module = net()
    index = torch.arange(entries)
    values = torch.sparse_coo_tensor(torch.stack([index, index]), torch.ones(entries), (8, 8))
    module.register_buffer("graph", values)
    return module


# how rank 1 builds another model -> what the error says
CASES: dict[str, tuple[Callable[[bool], nn.Module], str]] = {
    "shape": (lambda odd: net(8 + odd), "2.weight.shape is [8, 8] on rank 0, [9, 8] on rank 1"),
    "layer": (lambda odd: deeper(net()) if odd else net(), "3.weight is absent on rank 0, "),
    "dtype": (
        lambda odd: net().double() if odd else net(),
        '0.weight.dtype is "float32" on rank 0, "float64" on rank 1',
    ),
    "frozen": (
        lambda odd: frozen(net()) if odd else net(),
        "0.weight.requires_grad is true on rank 0, false on rank 1",
    ),
    "buffer": (
        lambda odd: other_buffer(net()) if odd else net(),
        "buffer 1.running_mean.shape is [8] on rank 0, [9] on rank 1",
    ),
    "order": (lambda odd: other_order(), "a comes on rank 0 where b comes on rank 1"),
    "sparse": (
        lambda odd: sparse(3 + odd),
        "buffer graph.inside.graph.indices.shape is [2, 3] on rank 0, [2, 4] on rank 1",
    ),
}
CONFIG = {
    "train_micro_batch_size_per_gpu": 4,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
}


def engine_of(module: nn.Module, stage: int, **more: Any) -> Any:
    config = {**CONFIG, "zero_optimization": {"stage": stage}}
    return drivetrain.initialize(model=module, config=config, **more)[0]


def answers(stages: tuple[int, ...]) -> dict[Any, str]:
    odd, found = bool(Ranks.current().rank), {}
    for stage in stages:
        for name, (build, _) in CASES.items():
            try:
                engine_of(build(odd), stage)
            except ConfigError as error:
                found[name, stage] = str(error)
        module = net()
        groups = [{"params": [*module[0].parameters()]}, {"params": [*module[1:].parameters()]}]
        try:
            engine_of(module, stage, model_parameters=groups[::-1] if odd else groups)
        except ConfigError as error:
            found["group", stage] = str(error)
        engine = engine_of(net(), stage)
        if odd:
            frozen(engine.module)
        try:
            engine.rebuild()
        except ConfigError as error:
            found["rebuilt", stage] = str(error)
        engine.destroy()
    return found


@pytest.mark.parametrize("env", [{}, {"DRIVETRAIN_DISABLE_PLUGINS": "drivetrain-cpu"}])
def test_every_rank_names_what_differs(env: dict[str, str]) -> None:
    stages = (0, 3) if env else (0, 1, 2, 3)
    wanted = {name: words for name, (_, words) in CASES.items()}
    wanted["group"] = "0.weight.optimizer group is 0 on rank 0, 1 on rank 1"
    wanted["rebuilt"] = CASES["frozen"][1]
    for found in run_distributed(answers, 2, stages, env=env):
        for name, words in wanted.items():
            for stage in stages:
                text = found[name, stage]
                assert text.startswith("ranks have built different models, rank 1 with rank 0")
                assert words in text, (name, stage)
