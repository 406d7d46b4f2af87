"""Copies and pickles of a sharded model are ordinary modules, or are refused by name."""

from __future__ import annotations

import copy
import io
import pickle
from typing import Any

import drivetrain_zero
import pytest
import torch
from torch import nn
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.errors import TrainingError
from drivetrain.testing import run_distributed

ZERO: dict[str, dict[str, Any]] = {
    "units": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "ahead": {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": True},
    "in forward": {"stage": 2, "overlap_param_gather": True},
    "whole": {"stage": 1},
}


class Net(nn.Module):
    """Blocks, a parameter of the model itself, tied weights, and a weight used from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4)) for _ in range(2)
        )
        self.scale = nn.Parameter(torch.ones(4))
        self.head, self.tied = nn.Linear(4, 4), nn.Linear(4, 4)
        self.tied.weight = self.head.weight
        drivetrain_zero.register_external_parameter(self.tied, self.blocks[0][0].weight)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for block in self.blocks:
            x = x + block(x)
        return self.tied(self.head(x * self.scale))


class OneBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.layer(x)


def engine_of(module: nn.Module, zero: dict[str, Any]) -> Engine:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "zero_optimization": zero,
    }
    return drivetrain.initialize(model=module, config=config)[0]


def data(step: int, rank: int) -> torch.Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(10 * step + rank))


def train(engine: Engine, steps: range) -> None:
    for step in steps:
        engine.backward(engine(data(step, engine.job.rank)).square().mean())
        engine.step()


def trained(steps: int) -> nn.Module:
    """The model after steps of plain torch."""
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step in range(steps):
        optimizer.zero_grad()
        for rank in range(2):
            (model(data(step, rank)).square().mean() / 2).backward()
        optimizer.step()
    return model


def loaded(module: nn.Module) -> nn.Module:
    file = io.BytesIO()
    torch.save(module, file)
    file.seek(0)
    found: nn.Module = torch.load(file, weights_only=False)
    return found


WAYS = {
    "copy": copy.deepcopy,
    "averaged": lambda module: AveragedModel(module).module,
    "pickled": lambda module: pickle.loads(pickle.dumps(module)),
    "saved": loaded,
}


def assert_is_like(module: nn.Module, expected: nn.Module) -> None:
    found = module.state_dict()
    for name, value in expected.state_dict().items():
        torch.testing.assert_close(found[name], value, rtol=1e-5, atol=1e-6)
    assert module.tied.weight is module.head.weight
    torch.testing.assert_close(module(data(9, 9)), expected(data(9, 9)), rtol=1e-5, atol=1e-6)


def copies_are_ordinary(zero: dict[str, Any]) -> None:
    """Rank 0 alone uses them, trains them, and they change nothing in the engine's model."""
    engine = engine_of(Net(), zero)
    with drivetrain.whole(engine.module):
        before = [make(engine.module) for make in WAYS.values()]
        block = copy.deepcopy(engine.module.blocks[1])
    train(engine, range(2))
    with drivetrain.whole(engine.module):
        after = [make(engine.module) for make in WAYS.values()]
    if engine.job.rank == 0:
        torch.testing.assert_close(block(data(9, 9)), Net().blocks[1](data(9, 9)))
        for modules, expected in ((before, Net()), (after, trained(2))):
            for module in modules:
                assert not any(hasattr(p, "drivetrain_handle") for p in module.parameters())
                assert_is_like(module, expected)
                assert_is_like(copy.deepcopy(module), expected)
                module(data(0, 0)).sum().backward()
                assert all(p.grad is not None for p in module.parameters())
    train(engine, range(2, 4))
    with drivetrain.whole(engine.module):
        assert_is_like(copy.deepcopy(engine.module), trained(4))
    other = engine_of(after[0], zero)  # a copy may be trained by an engine of its own
    train(other, range(2, 4))
    with drivetrain.whole(other.module):
        assert_is_like(copy.deepcopy(other.module), trained(4))


def averages(zero: dict[str, Any]) -> None:
    engine = engine_of(Net(), zero)
    plain = [trained(step) for step in range(3)]
    expected = AveragedModel(plain[0], multi_avg_fn=get_ema_multi_avg_fn(0.5))
    with drivetrain.whole(engine.module):
        average = AveragedModel(engine.module, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    for step in range(3):
        if step:
            train(engine, range(step - 1, step))
        with drivetrain.whole(engine.module):
            average.update_parameters(engine.module)
        expected.update_parameters(plain[step])
    if engine.job.rank == 1:
        assert_is_like(average.module, expected.module)


def shallow_copies_share(zero: dict[str, Any]) -> None:
    engine = engine_of(Net(), zero)
    shared = [copy.copy(engine.module)]
    with drivetrain.whole(engine.module):
        shared.append(copy.copy(engine.module))
    for module in shared:
        torch.testing.assert_close(module(data(9, 9)), Net()(data(9, 9)))
    train(engine, range(1))
    for module in shared:
        torch.testing.assert_close(module(data(9, 9)), trained(1)(data(9, 9)))


def refuses(zero: dict[str, Any]) -> None:
    for kind, name in ((Net, r"(scale|blocks\.0)"), (OneBlock, r"layer\.")):
        engine = engine_of(kind(), zero)
        for trains in (False, True):
            if trains:
                train(engine, range(1))
            for make in WAYS.values():
                with pytest.raises(TrainingError, match=f"{name}.*inside `with drivetrain.whole"):
                    make(engine.module)
        engine.destroy()


def refuses_engines(zero: dict[str, Any]) -> None:
    engine = engine_of(Net(), zero)
    for make in (copy.copy, *WAYS.values()):
        with pytest.raises(TrainingError, match=r"an engine can be neither copied nor pickled"):
            make(engine)


def copies_before_the_engine() -> None:
    """What ``zero.Init`` has cut is copied whole as well, or refused."""
    with drivetrain_zero.Init():
        module = Net()
        assert not copy.deepcopy(module.head).weight.isnan().any()
    with pytest.raises(TrainingError, match=r"inside `with drivetrain\.whole"):
        copy.deepcopy(module)
    with drivetrain.whole(module):
        copied = copy.deepcopy(module)
    assert_is_like(copied, Net())


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "gloo"])
def test_copies(shared: bool) -> None:
    without = {} if shared else {"DRIVETRAIN_DISABLE_PLUGINS": "drivetrain-cpu"}
    run_distributed(every_case, 2, env=without)


def every_case() -> None:
    for zero in ZERO.values():
        copies_are_ordinary(zero)
        averages(zero)
        refuses_engines(zero)
        shallow_copies_share(zero)
    refuses(ZERO["units"])
    copies_before_the_engine()
