"""Tensor parallelism in small: linear layers cut by columns and by rows, all else replicated."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import nn
from torch.nn import functional as F

from drivetrain.communication.functional import Functional, functional
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

WIDTH, HIDDEN = 4, 5


class Block(nn.Module):
    """A pre-norm feed-forward block; with :attr:`tp`, each rank has some of the hidden units."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, HIDDEN)
        self.down = nn.Linear(HIDDEN, WIDTH)
        self.tp: Functional | None = None

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        hidden = self.norm(x)
        hidden = hidden if self.tp is None else self.tp.copy(hidden)
        out = F.linear(torch.tanh(self.up(hidden)), self.down.weight)
        return x + (out if self.tp is None else self.tp.reduce(out)) + self.down.bias


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(3, WIDTH)
        self.blocks = nn.Sequential(Block(), Block())
        self.head = nn.Linear(WIDTH, 1)

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.head(self.blocks(self.stem(x))).squeeze(-1) - y).square().mean()


class ToyTensorParallelSection(Section):
    tp: PositiveInt = 2


class ToyTensorParallel(Plugin):
    """Cuts :class:`Block`; the parts of the hidden units are not equal."""

    name = "toy_tensor_parallel"
    sections: ClassVar[Sections] = {"toy_tensor_parallel": ToyTensorParallelSection}

    @hookimpl
    def mesh_axes(self) -> Sequence[AxisRequest]:
        return [Atom("tp", self.section(ToyTensorParallelSection).tp)]

    @hookimpl
    def transform_module(self, job: Job, module: nn.Module) -> Sequence[Transform]:
        def cut(model: nn.Module) -> nn.Module:
            for block in model.modules():
                if isinstance(block, Block):
                    block.tp = functional(job.communicator, "tp")
                    keep_part(job, block.up, "weight", dim=0)
                    keep_part(job, block.up, "bias", dim=0)
                    keep_part(job, block.down, "weight", dim=1)
            return model

        return [Transform(Phase.PARTITION, cut)]


def keep_part(job: Job, layer: nn.Module, name: str, dim: int) -> None:
    """Keep this rank's part of a parameter along ``dim``; the first rank has what is left over."""
    old: nn.Parameter = getattr(layer, name)
    extent, ranks, rank = old.shape[dim], job.mesh.size("tp"), job.mesh.coordinate("tp")
    size = extent // ranks + (extent % ranks if rank == 0 else 0)
    start = 0 if rank == 0 else extent % ranks + rank * (extent // ranks)
    offset = [0] * old.dim()
    offset[dim] = start
    new = nn.Parameter(old.detach().narrow(dim, start, size).clone(), old.requires_grad)
    job.parameters.replace(old, new)
    box = Box(tuple(offset), tuple(new.shape), 0)
    job.parameters.info(new).placement = Placement(tuple(old.shape), (box,), "tp")
    setattr(layer, name, new)
