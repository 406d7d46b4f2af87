"""Long training keeps as many hooks, queued objects and bytes as short training."""

from __future__ import annotations

import gc
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed

ZERO: list[dict[str, Any]] = [
    {"stage": 0},
    {"stage": 1, "overlap_comm": True},
    {"stage": 2, "overlap_comm": True},
    {"stage": 2, "overlap_comm": True, "overlap_param_gather": True},
    {"stage": 3, "overlap_comm": False, "stage3_param_persistence_threshold": 0},
    {"stage": 3, "overlap_comm": True, "stage3_param_persistence_threshold": 0},
]


STEPS = 30


class Clip(nn.Module):
    """Returns one of its parameters, as contrastive models do; one block returns one as well."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.logit_scale = nn.Parameter(torch.ones(()))

    def forward(self, x: torch.Tensor) -> dict[str, Any]:
        for block in self.blocks:
            x, size = block(x)
        return {"features": x * size, "logit_scale": self.logit_scale}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Sequential(nn.Linear(4, 4), nn.Tanh())
        self.size = nn.Parameter(torch.ones(4))

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return x + self.layer(x), self.size


def loss_of(engine: Engine, x: torch.Tensor) -> torch.Tensor:
    out = engine(x)
    return (out["features"] * out["logit_scale"]).square().mean()


def hooks(module: nn.Module, *tensors: torch.Tensor) -> int:
    """Hooks on modules, parameters and ``tensors``."""
    kinds = [name for name in vars(module) if name.endswith("_hooks")]
    count = sum(len(getattr(part, kind)) for part in module.modules() for kind in kinds)
    for tensor in (*module.parameters(), *tensors):
        count += len(tensor._backward_hooks or ())
        count += len(getattr(tensor, "_post_accumulate_grad_hooks", None) or ())
    return count


def kept() -> Iterator[int]:
    """Objects, entries of containers among them, and bytes of tensors."""
    gc.collect()
    objects = gc.get_objects()
    yield len(objects)
    yield sum(len(o) for o in objects if type(o) in (list, dict, set, deque))
    storages = [o.untyped_storage() for o in objects if type(o) is torch.Tensor]
    yield sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def after(engine: Engine, x: torch.Tensor, steps: int, derives: bool) -> tuple[int, ...]:
    for _ in range(steps):
        if derives:  # by the same leaf in every step, in passes that nobody goes on from as well
            (slope,) = torch.autograd.grad(loss_of(engine, x), x, create_graph=True)
            engine.backward(loss_of(engine, x) + slope.square().sum())
            torch.func.grad(lambda row: loss_of(engine, row))(x.detach())
            loss_of(engine, x)
            del slope
        else:
            engine.backward(loss_of(engine, x))
        engine.step()
    return hooks(engine.module, x), *kept()


def grew(before: tuple[int, ...], now: tuple[int, ...]) -> bool:
    """Whether a span added any hook, or one object, entry or number a step (caches fill slowly)."""
    hooks, *entries, size = (later - earlier for earlier, later in zip(before, now, strict=True))
    return hooks != 0 or max(entries) >= STEPS or size >= 4 * STEPS


def growth(ways: list[dict[str, Any]]) -> list[str]:
    """What grows with the number of steps."""
    found = []
    for zero, derives in [*((zero, False) for zero in ways), (ways[-1], True)]:
        config = {
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
            "zero_optimization": zero,
        }
        engine, *_ = drivetrain.initialize(model=Clip(), config=config)
        x = torch.randn(2, 4, requires_grad=derives)
        after(engine, x, STEPS, derives)  # some things are made once, and looking makes some
        seen = [after(engine, x, STEPS, derives) for _ in range(3)]
        # A buffer may be made late, once, on a busy machine; what leaks does so in every span.
        if grew(seen[0], seen[1]) and grew(seen[1], seen[2]):
            found.append(f"{zero}: hooks, objects, entries and bytes after each span: {seen}")
        engine.destroy()
    return found


@pytest.mark.parametrize("shared", [True, False], ids=["shared memory", "gloo"])
def test_training_leaves_nothing_behind(shared: bool) -> None:
    without = {} if shared else {"DRIVETRAIN_DISABLE_PLUGINS": "drivetrain-cpu"}
    ways = ZERO[-1:] if shared else ZERO
    for found in run_distributed(growth, 2, ways, env=without):
        assert not found
