"""A parameter that is joined of parts of several client's tensors is saved and loaded as these."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import drivetrain
from drivetrain.checkpoint.state import client_fragments
from drivetrain.communication.functional import Functional, functional
from drivetrain.contracts import (
    Atom,
    AxisRequest,
    Box,
    ParameterTable,
    Phase,
    Placement,
    Plugin,
    Transform,
    hookimpl,
)
from drivetrain.engine.engine import Engine
from drivetrain.job.job import Job
from drivetrain.plan.registry import Registry
from drivetrain.states.device_home import tensor_fragment
from drivetrain.testing import RanksFailedError, run_distributed

WIDTH, ROWS, STEPS = 3, 4, 4
LENGTHS = {"q": 4, "k": 2, "v": 2}


class Apart(nn.Module):
    """As the client has it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        for name, length in LENGTHS.items():
            self.add_module(name, nn.Linear(WIDTH, length))

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return loss_of(self.q(x), self.k(x), self.v(x), y, None)


class Joined(nn.Module):
    """One product in place of three; each rank has some rows of each."""

    def __init__(self, job: Job, apart: Apart) -> None:
        super().__init__()
        self.tp = functional(job.communicator, "tp")
        self.lengths = [length // self.tp.size for length in LENGTHS.values()]
        for kind in ("weight", "bias"):
            self.register_parameter(kind, self._join(job, apart, kind))

    def _join(self, job: Job, apart: Apart, kind: str) -> nn.Parameter:
        parts, boxes, start, offset = [], [], 0, 0
        for (name, whole), own in zip(LENGTHS.items(), self.lengths, strict=True):
            tensor = getattr(apart.get_submodule(name), kind).detach()
            parts.append(tensor.narrow(0, self.tp.rank * own, own))
            rest = tuple(tensor.shape[1:])
            place = (start + self.tp.rank * own, *(0 for _ in rest))
            boxes.append(Box(place, (own, *rest), offset))
            start, offset = start + whole, offset + parts[-1].numel()
        joined = nn.Parameter(torch.cat(parts))
        job.parameters.name(joined, f"qkv.{kind}")
        self.placements = {
            **getattr(self, "placements", {}),
            kind: Placement(
                (start, *joined.shape[1:]),
                tuple(boxes),
                "tp",
                joined=tuple((f"{name}.{kind}", length) for name, length in LENGTHS.items()),
            ),
        }
        return joined

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        q, k, v = F.linear(x, self.weight, self.bias).split(self.lengths, dim=-1)
        return loss_of(q, k, v, y, self.tp)


def loss_of(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, y: torch.Tensor, tp: Functional | None
) -> torch.Tensor:
    out = q.tanh().sum(-1) + (k * v).sum(-1)
    return ((out if tp is None else tp.reduce(out)) - y).square().mean()


class Join(Plugin):
    name = "join"

    @hookimpl
    def mesh_axes(self) -> Sequence[AxisRequest]:
        return [Atom("tp", 2)]

    @hookimpl
    def transform_module(self, job: Job, module: nn.Module) -> Sequence[Transform]:
        return [Transform(Phase.PARTITION, lambda model: Joined(job, model))]

    @hookimpl
    def describe_parameters(self, job: Job, module: Joined) -> None:
        for kind, placement in module.placements.items():
            job.parameters.info(getattr(module, kind)).placement = placement


class TooShort(Join):
    name = "too_short"

    @hookimpl
    def describe_parameters(self, job: Job, module: Joined) -> None:
        placed = module.placements["weight"]
        job.parameters.info(module.weight).placement = Placement(
            placed.global_shape, placed.boxes, "tp", joined=placed.joined[:2]
        )


def make(stage: int, *plugins: type[Plugin], shards: int = 1) -> Engine:
    engine, *_ = drivetrain.initialize(
        model=Apart().double(),
        config={
            "train_micro_batch_size_per_gpu": ROWS,
            "train_batch_size": ROWS * shards,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.05}},
            "zero_optimization": {"stage": stage, "stage3_param_persistence_threshold": 0},
            "plugins": {plugin.name: True for plugin in plugins},
        },
        registry=Registry.installed().with_plugins(*plugins),
    )
    return engine


def data(step: int, shard: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(10 * step + shard)
    x = torch.randn(ROWS, WIDTH, generator=generator, dtype=torch.float64)
    return x, x.sum(-1).sin()


def train(engine: Engine, begin: int, end: int, shards: int) -> list[float]:
    """Mean loss over all shards of data by step."""
    ranks = engine.job.mesh.size("dp")
    own = [engine.job.mesh.coordinate("dp")] if ranks > 1 else range(shards)
    losses = []
    for step in range(begin, end):
        found = []
        for shard in own:
            loss = engine(*data(step, shard))
            engine.backward(loss)
            engine.step()
            found.append(loss.detach())
        total = functional(engine.job.communicator, "dp").all_reduce(torch.stack(found).mean())
        losses.append(total.item() / ranks)
    return losses


# -- functions that run on every rank --------------------------------------------------------------


def save(folder: str, stage: int, plugins: Any) -> list[float]:
    engine = make(stage, *plugins, shards=2)
    train(engine, 0, 2, 2)
    engine.save_checkpoint(folder)
    losses = train(engine, 2, STEPS, 2)
    engine.destroy()
    return losses


def load(folder: str, stage: int, plugins: Any) -> list[float]:
    engine = make(stage, *plugins, shards=2)
    engine.load_checkpoint(folder)
    losses = train(engine, 2, STEPS, 2)
    engine.destroy()
    return losses


# -- claims ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", [0, 1, 3])
def test_joined_parameters_are_saved_as_the_tensors_of_the_client(
    stage: int, tmp_path: Path
) -> None:
    (expected,) = run_distributed(save, 1, str(tmp_path / "apart"), 0, ())
    for losses in run_distributed(save, 4, str(tmp_path / "joined"), stage, (Join,)):
        assert losses == pytest.approx(expected, rel=1e-9)
    for losses in run_distributed(load, 4, str(tmp_path / "apart"), stage, (Join,)):
        assert losses == pytest.approx(expected, rel=1e-9)
    for losses in run_distributed(load, 2, str(tmp_path / "joined"), stage, ()):
        assert losses == pytest.approx(expected, rel=1e-9)


def test_lengths_must_add_up() -> None:
    text = r"joined of \[\['q.weight', 4\], \['k.weight', 2\]\], which have 6 rows together"
    with pytest.raises(RanksFailedError, match=text):
        run_distributed(save, 2, "nowhere", 0, (TooShort,))


def test_a_box_over_several_tensors_is_cut() -> None:
    module, table = nn.Linear(WIDTH, 8, bias=False), ParameterTable()
    table.register(module, "data")
    info = table.info(module.weight)
    joined = tuple((name, length) for name, length in LENGTHS.items())
    info.placement = Placement((8, WIDTH), (Box((1, 0), (6, WIDTH), 0),), "tp", joined=joined)
    rows = torch.arange(6.0 * WIDTH).view(6, WIDTH)
    whole = tensor_fragment("weight", "master", rows, owner=True, placement=info.placement)
    found = {f.name: f for f in client_fragments([whole], table, module)}
    expected = {"q": (1, rows[:3]), "k": (0, rows[3:5]), "v": (0, rows[5:])}
    assert found.keys() == expected.keys()
    for name, (first, values) in expected.items():
        (box,) = found[name].boxes
        assert (found[name].global_shape, box.global_offset) == ((LENGTHS[name], 3), (first, 0))
        assert torch.equal(box.of_storage(found[name].read()), values)
    found["k"].write(torch.full((6,), -1.0))
    assert rows[:, 0].tolist() == [0, 3, 6, -1, -1, 15]
