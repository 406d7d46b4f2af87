"""Bring tokens to the ranks of their experts, and answers back.

One exchange of counts tells each rank how many tokens come for each of its experts; one all-to-all
of uneven rows brings them, and one brings the answers back. Backward runs the same two exchanges
the other way round, on every rank, whether or not it had any tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import nn

from drivetrain.communication.functional import Functional
from drivetrain_moe.routing import Routed

Compute = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""Takes tokens [n, d] in order of this rank's experts, and their numbers [experts here] on the
device; returns [n, d]."""


def through_experts(
    x: torch.Tensor,
    routed: Routed,
    experts: int,
    compute: Compute,
    axis: Functional | None,
    answers: Iterable[nn.Parameter] = (),
) -> torch.Tensor:
    """Have experts compute their tokens; returns the weighted sum for each token, [S, d].

    Args:
        x: [S, d].
        routed: which tokens go where.
        experts: how many there are, on all ranks of ``axis``.
        compute: this rank's experts.
        axis: whose ranks have the other experts; ``None`` if this rank has all.
        answers: parameters of this rank's experts.
    """
    rows = x.index_select(0, routed.token)
    counts = torch.bincount(routed.expert, minlength=experts)
    if axis is None or axis.size == 1:
        back = _computed(rows, counts, compute, answers)
    else:
        sent = axis.counts(counts.view(axis.size, -1), len(rows))
        came = axis.exchange(rows, sent.received, sent.sent)
        order = _by_expert(sent.table)
        done = _computed(came.index_select(0, order), sent.table.sum(0), compute, answers)
        # Where row i came to lie, so that answers go back in the order in which tokens came.
        done = done.index_select(0, order.argsort())
        back = axis.exchange(done, sent.sent, sent.received)
    weighted = back.to(routed.weight.dtype) * routed.weight.unsqueeze(-1)
    out = weighted.new_zeros(len(x), back.shape[-1])
    return out.index_add(0, routed.token, weighted).to(back.dtype)


def _by_expert(table: torch.Tensor) -> torch.Tensor:
    """An order that brings rows which came by rank, and by expert of each rank, to experts."""
    size, own = table.shape
    expert = torch.arange(own, device=table.device).repeat(size)
    return expert.repeat_interleave(table.reshape(-1)).argsort(stable=True)


def _computed(
    rows: torch.Tensor, counts: torch.Tensor, compute: Compute, answers: Iterable[nn.Parameter]
) -> torch.Tensor:
    if len(rows):
        return compute(rows, counts)
    # Experts without tokens are part of the graph as others are: their gradients are zeros, and
    # backward comes through this layer, in whose exchanges others wait for this rank.
    return _reaching(rows, *(p for p in answers if p.requires_grad))


def _reaching(rows: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
    apply: Any = _Reaching.apply  # torch does not type it
    reached: torch.Tensor = apply(rows, *others)
    return reached


class _Reaching(torch.autograd.Function):
    """Nothing computed of no rows; the gradients of all that could have taken part are zeros."""

    @staticmethod
    def forward(ctx: Any, rows: torch.Tensor, *others: torch.Tensor) -> torch.Tensor:
        ctx.others = [(other.shape, other.dtype, other.device) for other in others]
        return rows.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        zeros = (
            torch.zeros(shape, dtype=dtype, device=device) for shape, dtype, device in ctx.others
        )
        return gradient, *zeros
