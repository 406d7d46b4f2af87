"""Which parts of a weight are kept: those with the largest scores."""

from __future__ import annotations

import math
from typing import Any

import torch


def largest(scores: torch.Tensor, ratio: float) -> torch.Tensor:
    """True for the ``ceil(ratio n)`` largest of n scores; of equal ones the first.

    Args:
        scores: any shape.
        ratio: share that is kept, in (0, 1].

    Returns:
        Booleans of the shape of ``scores``.
    """
    flat = scores.reshape(-1)
    order = torch.sort(flat, descending=True, stable=True).indices
    kept = torch.zeros_like(flat, dtype=torch.bool)
    kept[order[: math.ceil(ratio * flat.numel())]] = True
    return kept.view(scores.shape)


class _TopK(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, ratio: float) -> torch.Tensor:
        return largest(scores, ratio).to(scores.dtype)

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, None


def learned_mask(scores: torch.Tensor, ratio: float) -> torch.Tensor:
    """1 for the largest scores, else 0; its gradient passes to all scores unchanged.

    Sanh et al. 2020, "Movement Pruning", arXiv:2005.07683, section 4.
    """
    apply: Any = _TopK.apply  # torch does not type it
    mask: torch.Tensor = apply(scores, ratio)
    return mask


class _Threshold(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, scores: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
        mask = largest(scores, float(torch.sigmoid(threshold))).to(scores.dtype)
        ctx.save_for_backward(mask)
        return mask

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        (mask,) = ctx.saved_tensors
        return gradient, (gradient * mask).sum().reshape(())


def learned_ratio_mask(scores: torch.Tensor, threshold: torch.Tensor) -> torch.Tensor:
    """:func:`learned_mask` whose ratio is ``sigmoid(threshold)``; the gradient of that is the sum
    of the gradients of what is kept.

    Args:
        scores: any shape.
        threshold: 0-d.
    """
    apply: Any = _Threshold.apply
    mask: torch.Tensor = apply(scores, threshold)
    return mask
