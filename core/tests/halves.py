"""A plugin that keeps a rank's part of two layers: rows of the first, columns of the second."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import nn

from drivetrain.contracts import (
    Atom,
    AxisRequest,
    Box,
    Phase,
    Placement,
    Plugin,
    PositiveInt,
    Section,
    Sections,
    Transform,
    hookimpl,
)
from drivetrain.job.job import Job


class HalvesSection(Section):
    tp: PositiveInt = 1
    parts: PositiveInt = 2


class Halves(Plugin):
    """Cuts as for ``parts`` ranks along ``tp``, of which there may be one alone."""

    name = "halves"
    sections: ClassVar[Sections] = {"halves": HalvesSection}

    @hookimpl
    def mesh_axes(self) -> Sequence[AxisRequest]:
        return [Atom("tp", self.section(HalvesSection).tp)]

    @hookimpl
    def transform_module(self, job: Job, module: nn.Module) -> Sequence[Transform]:
        def cut(module: nn.Module) -> nn.Module:
            for name, dim in (("first.weight", 0), ("first.bias", 0), ("second.weight", 1)):
                self._cut(job, module, name, dim)
            return module

        return [Transform(Phase.PARTITION, cut)]

    def _cut(self, job: Job, module: nn.Module, name: str, dim: int) -> None:
        path, _, key = name.rpartition(".")
        layer: Any = module.get_submodule(path)
        old = getattr(layer, key)
        extent = old.shape[dim] // self.section(HalvesSection).parts
        start = extent * job.mesh.coordinate("tp")
        new = nn.Parameter(old.detach().narrow(dim, start, extent).clone())
        setattr(layer, key, new)
        job.parameters.replace(old, new)
        offset = tuple(start if axis == dim else 0 for axis in range(old.dim()))
        placement = Placement(tuple(old.shape), (Box(offset, tuple(new.shape), 0),), "tp")
        job.parameters.info(new).placement = placement


class Net(nn.Module):
    """Two layers that are cut, a norm with buffers, tied embeddings, and a buffer not saved."""

    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.tokens = nn.Embedding(5, 4)
        self.first = nn.Linear(4, width)
        self.norm = nn.BatchNorm1d(width)
        self.second = nn.Linear(width, 4)
        self.angles = Angles()
        self.head = nn.Linear(4, 5)
        self.head.weight = self.tokens.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.norm(self.first(self.tokens(x) * self.angles.table)))
        return self.head(self.second(hidden))


class Angles(nn.Module):
    """A table that is made anew in every process."""

    table: torch.Tensor

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("table", torch.empty(4), persistent=False)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        self.table = torch.arange(4, device=self.table.device) / 4 + 1
