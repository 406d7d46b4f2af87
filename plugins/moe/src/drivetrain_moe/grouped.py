"""One matrix product for each expert, over tokens in order of experts."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn import functional


def grouped_linear(
    x: torch.Tensor, weight: torch.Tensor, counts: torch.Tensor, bias: torch.Tensor | None = None
) -> torch.Tensor:
    """Multiply each expert's tokens by its weight.

    Args:
        x: [n, d], tokens in order of experts.
        weight: [E, d, f].
        counts: [E] on the device, tokens of each expert; they add up to n.
        bias: [E, f].

    Returns:
        [n, f].
    """
    if torch.is_autocast_enabled(x.device.type):
        x = x.to(torch.get_autocast_dtype(x.device.type))
    weight = weight.to(x.dtype)
    if x.device.type == "cpu":  # where torch's own is a loop, too, and its backward is slower
        apply: Any = _Loop.apply  # torch does not type it
        y: torch.Tensor = apply(x, weight, counts.tolist())
    else:
        ends = counts.cumsum(0).to(torch.int32)
        y = functional.grouped_mm(x, weight, offs=ends)
    if bias is not None:
        rows = torch.arange(len(counts), device=x.device).repeat_interleave(counts)
        y = y + bias.to(y.dtype).index_select(0, rows)
    return y


class _Loop(torch.autograd.Function):
    """A product for each expert that has tokens, written into place."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, weight: torch.Tensor, counts: list[int]) -> torch.Tensor:
        ctx.save_for_backward(x, weight)
        ctx.counts = counts
        y = x.new_empty(x.shape[0], weight.shape[2])
        for rows, matrix, into in zip(
            torch.split(x, counts), weight, torch.split(y, counts), strict=True
        ):
            torch.mm(rows, matrix, out=into)
        return y

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        counts, gradient = ctx.counts, gradient.contiguous()
        to_x = torch.empty_like(x) if ctx.needs_input_grad[0] else None
        to_weight = torch.empty_like(weight) if ctx.needs_input_grad[1] else None
        pieces = torch.split(gradient, counts)
        if to_x is not None:
            for piece, matrix, into in zip(pieces, weight, torch.split(to_x, counts), strict=True):
                torch.mm(piece, matrix.t(), out=into)
        if to_weight is not None:
            for rows, piece, into in zip(torch.split(x, counts), pieces, to_weight, strict=True):
                torch.mm(rows.t(), piece, out=into)
        return to_x, to_weight, None
