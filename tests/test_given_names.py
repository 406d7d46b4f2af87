"""Stages of a pipeline and parts of buffers are saved under the client's names."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.contracts import (
    Atom,
    AxisRequest,
    Box,
    Phase,
    Placement,
    Plugin,
    Transform,
    hookimpl,
)
from drivetrain.engine.engine import Engine
from drivetrain.errors import ConfigError
from drivetrain.job.job import Job
from drivetrain.plan.registry import Registry
from drivetrain.testing import RanksFailedError, run_distributed

WIDTH, LAYERS = 4, 4


class Layer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.norm = nn.BatchNorm1d(WIDTH)
        self.register_buffer("shift", torch.arange(WIDTH, dtype=torch.float32))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.norm(self.linear(x)) + self.shift


class Stages(Plugin):
    """Each rank builds the layers of its stage, in place of the client's, and names them."""

    name = "stages"

    @hookimpl
    def mesh_axes(self) -> Sequence[AxisRequest]:
        return [Atom("pp", 2)]

    @hookimpl
    def transform_module(self, job: Job, module: nn.Module) -> Sequence[Transform]:
        def build(model: nn.Module) -> nn.Module:
            own = LAYERS // 2
            stage = nn.Sequential(*(Layer() for _ in range(own)))
            for name, parameter in stage.named_parameters():
                job.parameters.name(parameter, self._name(job, name))
            return stage

        return [Transform(Phase.PARTITION, build)]

    @staticmethod
    def _name(job: Job, name: str) -> str:
        index, _, rest = name.partition(".")
        return f"{int(index) + job.mesh.coordinate('pp') * LAYERS // 2}.{rest}"

    @hookimpl
    def describe_parameters(self, job: Job, module: nn.Module) -> None:
        table = job.parameters
        for parameter in module.parameters():
            table.info(parameter).distinct += ("pp",)
        for _, _, info in table.buffers(module):
            info.name, info.distinct = self._name(job, info.name), ("pp",)


class Unnamed(Stages):
    """Forgets all of this."""

    name = "unnamed"

    @hookimpl
    def transform_module(self, job: Job, module: nn.Module) -> Sequence[Transform]:
        def build(model: nn.Module) -> nn.Module:
            rest = [*model[2:]] if job.mesh.coordinate("pp") else [*model[:2]]
            return nn.ModuleList([*rest, nn.Linear(1 + job.mesh.coordinate("pp"), 1)])

        return [Transform(Phase.PARTITION, build)]

    @hookimpl
    def describe_parameters(self, job: Job, module: nn.Module) -> None:
        for parameter in module.parameters():
            job.parameters.info(parameter).distinct += ("pp",)


class Twice(Unnamed):
    name = "twice"

    @hookimpl
    def describe_parameters(self, job: Job, module: nn.Module) -> None:
        job.parameters.name(module[1].linear.weight, "0.linear.weight")


class Parts(Plugin):
    """Each rank has a part of a buffer."""

    name = "parts"

    @hookimpl
    def mesh_axes(self) -> Sequence[AxisRequest]:
        return [Atom("tp", 2)]

    @hookimpl
    def describe_parameters(self, job: Job, module: nn.Module) -> None:
        for layer in module:
            rank, size = job.mesh.coordinate("tp"), WIDTH // 2
            layer.shift = layer.shift[rank * size :][:size].clone()
            box = Box((rank * size,), (size,), 0)
            job.parameters.buffer(layer, "shift").placement = Placement((WIDTH,), (box,), "tp")


def make(*plugins: type[Plugin]) -> Engine:
    engine, *_ = drivetrain.initialize(
        model=nn.Sequential(*(Layer() for _ in range(LAYERS))),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
            "plugins": {plugin.name: True for plugin in plugins},
        },
        registry=Registry.installed().with_plugins(*plugins),
    )
    return engine


def contents(engine: Engine) -> dict[str, torch.Tensor]:
    """Parameters and buffers of this rank by the client's names."""
    table = engine.job.parameters
    found = {table.info(p).name: p.detach().clone() for p in engine.module.parameters()}
    return found | {info.name: buffer.clone() for _, buffer, info in table.buffers(engine.module)}


# -- functions that run on every rank --------------------------------------------------------------


def save(folder: str, plugin: type[Plugin] | None) -> dict[str, torch.Tensor]:
    engine = make(*([plugin] if plugin else []))
    torch.manual_seed(engine.job.mesh.coordinate("pp"))
    rank = engine.job.mesh.coordinate("dp")
    for buffer in engine.module.buffers():
        if buffer.is_floating_point() and buffer.numel() == WIDTH:
            buffer.add_(torch.randn_like(buffer) + rank)  # batch statistics differ between ranks
    engine.save_checkpoint(folder)
    saved = contents(engine)
    engine.destroy()
    return saved


def load(folder: str, plugin: type[Plugin] | None) -> dict[str, torch.Tensor]:
    engine = make(*([plugin] if plugin else []))
    engine.load_checkpoint(folder)
    loaded = contents(engine)
    engine.destroy()
    return loaded


# -- claims ----------------------------------------------------------------------------------------


def test_stages_load_into_one_process_and_the_other_way_round(tmp_path: Path) -> None:
    saved = run_distributed(save, 4, str(tmp_path / "stages"), Stages)
    (alone,) = run_distributed(load, 1, str(tmp_path / "stages"), None)
    assert set(alone) == {*saved[0], *saved[2]}
    for name, values in {**saved[0], **saved[2]}.items():
        assert torch.equal(alone[name], values), name
    for same, before in zip(
        run_distributed(load, 4, str(tmp_path / "stages"), Stages), saved, strict=True
    ):
        assert all(torch.equal(same[name], values) for name, values in before.items())

    (whole,) = run_distributed(save, 1, str(tmp_path / "alone"), None)
    for stage in run_distributed(load, 2, str(tmp_path / "alone"), Stages):
        assert all(torch.equal(whole[name], values) for name, values in stage.items())


def test_parts_of_buffers_are_put_together(tmp_path: Path) -> None:
    saved = run_distributed(save, 2, str(tmp_path / "parts"), Parts)
    (alone,) = run_distributed(load, 1, str(tmp_path / "parts"), None)
    for name, values in alone.items():
        parts = [rank[name] for rank in saved]
        expected = torch.cat(parts) if "shift" in name else parts[0]
        assert torch.equal(values, expected), name
    run_distributed(save, 1, str(tmp_path / "alone"), None)
    (whole,) = run_distributed(load, 1, str(tmp_path / "alone"), None)
    loaded = run_distributed(load, 2, str(tmp_path / "alone"), Parts)
    for name in (name for name in whole if "shift" in name):
        assert torch.equal(torch.cat([rank[name] for rank in loaded]), whole[name])


def test_buffers_of_stages_must_be_described() -> None:
    with pytest.raises(
        RanksFailedError, match=r"(?s)buffer .* along pp ranks have copies or parts"
    ):
        run_distributed(save, 2, "nowhere", Unnamed)


def test_two_parameters_of_one_name_are_refused() -> None:
    with pytest.raises((RanksFailedError, ConfigError), match=r"are called 0\.linear\.weight"):
        run_distributed(save, 2, "nowhere", Twice)
