"""The exchange of heads over a process group of torch, for scripts that have no job."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist


class GroupLine:
    """The ranks of a process group, in order; what :class:`~drivetrain_sequence.heads.Line` asks.

    Args:
        group: torch's; ``None`` for all ranks.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        alone = not dist.is_initialized()
        self.size = 1 if alone else dist.get_world_size(group)
        self.rank = 0 if alone else dist.get_rank(group)

    def exchange(
        self, x: torch.Tensor, output_splits: Sequence[int], input_splits: Sequence[int]
    ) -> torch.Tensor:
        """All-to-all of slices of dimension 0; its gradient goes the other way."""
        splits = (list(output_splits), list(input_splits))
        y: torch.Tensor = _Exchange.apply(x, self, *splits)  # type: ignore[no-untyped-call]
        return y

    def all_gather(self, x: torch.Tensor) -> torch.Tensor:
        """Join what all ranks have along dimension 0; a gradient is this rank's slice."""
        y: torch.Tensor = _Gather.apply(x, self)  # type: ignore[no-untyped-call]
        return y


class _Exchange(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: torch.Tensor, line: GroupLine, output: list[int], input_: list[int]
    ) -> torch.Tensor:
        ctx.line, ctx.output, ctx.input = line, output, input_
        if line.size == 1:
            return x.clone()
        y = x.new_empty((sum(output), *x.shape[1:]))
        dist.all_to_all_single(y, x.contiguous(), output, input_, group=line.group)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return ctx.line.exchange(gradients[0], ctx.input, ctx.output), None, None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, line: GroupLine) -> torch.Tensor:
        ctx.line, ctx.rows = line, x.shape[0]
        if line.size == 1:
            return x.clone()
        y = x.new_empty((line.size * x.shape[0], *x.shape[1:]))
        dist.all_gather_into_tensor(y, x.contiguous(), group=line.group)
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        start = ctx.line.rank * ctx.rows
        return gradients[0][start : start + ctx.rows], None
