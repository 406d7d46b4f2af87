"""Rows of tokens in order of experts, and sums of their answers, each in one pass over memory.

Autograd's own backward of a choice of rows fills zeros and adds into them row by row. Here both
ways are one gather, or one sum over the rows of each token, which are known from the same numbers.
All of it can be differentiated again.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional


@dataclass(frozen=True)
class Places:
    """Which rows are whose.

    Args:
        token: [A] number of the token of each row.
        rows: [A] numbers of rows, those of the first token first.
        starts: [S] where each token's begin in ``rows``.
    """

    token: torch.Tensor
    rows: torch.Tensor
    starts: torch.Tensor

    @staticmethod
    def of(token: torch.Tensor, tokens: int) -> Places:
        """The places of rows that are of the tokens ``token`` [A], of ``tokens`` in all."""
        counts = torch.bincount(token, minlength=tokens)
        return Places(token, token.argsort(stable=True), counts.cumsum(0) - counts)


def chosen(x: torch.Tensor, places: Places) -> torch.Tensor:
    """The token of each row: [S, d] -> [A, d]."""
    apply: Any = _Chosen.apply  # torch does not type it
    rows: torch.Tensor = apply(x, places)
    return rows


def summed(rows: torch.Tensor, places: Places, weight: torch.Tensor | None = None) -> torch.Tensor:
    """The sum of the rows of each token, times ``weight`` [A]: [A, d] -> [S, d]."""
    apply: Any = _Summed.apply if weight is None else _Weighted.apply
    sums: torch.Tensor = apply(rows, *(() if weight is None else (weight,)), places)
    return sums


def permuted(rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor) -> torch.Tensor:
    """``rows[order]``, where ``inverse`` brings them back."""
    apply: Any = _Permuted.apply
    found: torch.Tensor = apply(rows, order, inverse)
    return found


def _bags(rows: torch.Tensor, places: Places, weight: torch.Tensor | None) -> torch.Tensor:
    if not len(places.rows) or not len(places.starts):
        return rows.new_zeros(len(places.starts), rows.shape[-1])
    options: dict[str, Any] = {"mode": "sum", "per_sample_weights": weight}
    return functional.embedding_bag(places.rows, rows, places.starts, **options)


class _Chosen(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, places: Places) -> torch.Tensor:
        ctx.places = places
        return x.index_select(0, places.token)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return summed(gradients[0], ctx.places), None


class _Summed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, places: Places) -> torch.Tensor:
        ctx.places = places
        return _bags(rows, places, None)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        return chosen(gradients[0], ctx.places), None


class _Weighted(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, weight: torch.Tensor, places: Places) -> torch.Tensor:
        ctx.save_for_backward(rows, weight)
        ctx.places = places
        return _bags(rows, places, weight.index_select(0, places.rows))

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        rows, weight = ctx.saved_tensors
        back = chosen(gradients[0], ctx.places)
        to_weight = (rows * back).sum(-1) if ctx.needs_input_grad[1] else None
        if not ctx.needs_input_grad[0]:
            return None, to_weight, None
        again, factor = torch.is_grad_enabled(), weight.unsqueeze(-1)
        return back * factor if again else back.mul_(factor), to_weight, None


class _Permuted(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, rows: torch.Tensor, order: torch.Tensor, inverse: torch.Tensor
    ) -> torch.Tensor:
        ctx.save_for_backward(order, inverse)
        return rows.index_select(0, order)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        order, inverse = ctx.saved_tensors
        return permuted(gradients[0], inverse, order), None, None
