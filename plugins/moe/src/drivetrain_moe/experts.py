"""The experts of a layer, of which a rank may have some: modules, or fused tensors."""

from __future__ import annotations

import copy
from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain.contracts import Box, Placement
from drivetrain.errors import ConfigError
from drivetrain_moe.grouped import ACTIVATIONS, Shape, grouped_mlp

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_moe.axes import ExpertAxes


class ExpertList(nn.ModuleDict):
    """Experts that are modules of any kind, each called with its tokens [n, d].

    Keys are numbers of experts in the whole layer, so names do not depend on how many a rank has.

    Args:
        expert: the first one; others are copies.
        count: how many.
    """

    def __init__(self, expert: nn.Module, count: int) -> None:
        super().__init__({str(i): copy.deepcopy(expert) for i in range(count)})
        self.count = count

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Compute tokens [n, d] in order of this rank's experts, ``counts`` of each."""
        outputs = []
        for expert, rows in zip(self.values(), torch.split(x, counts.tolist()), strict=True):
            output = expert(rows)
            outputs.append(output[0] if isinstance(output, tuple) else output)
        return torch.cat(outputs)

    def keep(self, job: Job, axes: ExpertAxes) -> None:
        """Drop the experts that other ranks have."""
        own = self.count // axes.size
        first = own * job.mesh.coordinate(axes.experts)
        for number in range(self.count):
            if not first <= number < first + own:
                del self[str(number)]

    def describe(self, job: Job, axes: ExpertAxes) -> None:
        """Say along which axes ranks have copies of an expert, and along which other experts."""
        describe_modules(self, job, axes)


class GroupedMLP(nn.Module):
    """Feed-forward experts in fused tensors, [E, in, out], computed by grouped products.

    Args:
        count: experts.
        hidden_size: width of tokens.
        ffn_size: width inside.
        activation: one of :data:`ACTIVATIONS`.
        gated: whether the activation of one product is multiplied by another (SwiGLU).
        bias: whether products have a bias.

    Raises:
        ConfigError: there is no such activation.
    """

    def __init__(
        self,
        count: int,
        hidden_size: int,
        ffn_size: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
    ) -> None:
        super().__init__()
        if activation not in ACTIVATIONS:
            raise ConfigError(
                f"activation {activation!r} of experts is not one of {', '.join(ACTIVATIONS)}"
            )
        self.count, self.gated, self.activation = count, gated, activation
        inner = 2 * ffn_size if gated else ffn_size
        self.up = nn.Parameter(torch.empty(count, hidden_size, inner))
        self.down = nn.Parameter(torch.empty(count, ffn_size, hidden_size))
        self.up_bias = nn.Parameter(torch.zeros(count, inner)) if bias else None
        self.down_bias = nn.Parameter(torch.zeros(count, hidden_size)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw weights as ``nn.Linear`` does, each expert's by itself."""
        for weight in (self.up, self.down):
            bound = weight.shape[1] ** -0.5
            nn.init.uniform_(weight, -bound, bound)
        for bias in (self.up_bias, self.down_bias):
            if bias is not None:
                nn.init.zeros_(bias)

    def forward(self, x: torch.Tensor, counts: torch.Tensor) -> torch.Tensor:
        """Compute tokens [n, d] in order of this rank's experts, ``counts`` of each."""
        shape = Shape(self.activation, self.gated)
        return grouped_mlp(x, self.up, self.down, counts, shape, self.up_bias, self.down_bias)

    def keep(self, job: Job, axes: ExpertAxes) -> None:
        """Keep the rows of fused tensors that are this rank's experts."""
        keep_rows(self, job, axes)

    def describe(self, job: Job, axes: ExpertAxes) -> None:
        """Say which rows of the whole tensors this rank has."""
        describe_rows(self, job, axes)


def keep_rows(module: nn.Module, job: Job, axes: ExpertAxes) -> None:
    """Keep this rank's part of dimension 0 of all parameters of ``module``."""
    place = job.mesh.coordinate(axes.experts)
    for part in module.modules():
        for name, old in list(part.named_parameters(recurse=False)):
            rows = old.shape[0] // axes.size
            own = old.detach()[place * rows : (place + 1) * rows].clone()
            new = nn.Parameter(own, requires_grad=old.requires_grad)
            setattr(part, name, new)
            job.parameters.replace(old, new)


def describe_rows(module: nn.Module, job: Job, axes: ExpertAxes) -> None:
    """State the placement of what :func:`keep_rows` has kept."""
    place = job.mesh.coordinate(axes.experts)
    for parameter in module.parameters():
        info = job.parameters.info(parameter)
        shape = tuple(parameter.shape)
        offset = (place * shape[0], *(0 for _ in shape[1:]))
        whole = (axes.size * shape[0], *shape[1:])
        info.placement = Placement(whole, (Box(offset, shape, 0),), axes.experts)
        info.reduction = axes.copies


def describe_modules(module: nn.Module, job: Job, axes: ExpertAxes) -> None:
    """State that other ranks have copies of ``module``, or have other experts under other names."""
    for part in module.modules():
        for parameter in part.parameters(recurse=False):
            info = job.parameters.info(parameter)
            info.reduction = axes.copies
            info.distinct = (*info.distinct, axes.experts)
        for name, buffer in part.named_buffers(recurse=False):
            if buffer is not None:
                known = job.parameters.buffer(part, name)
                known.reduction = axes.copies
                known.distinct = (*known.distinct, axes.experts)
