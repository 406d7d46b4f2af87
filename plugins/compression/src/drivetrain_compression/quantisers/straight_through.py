"""Gradients that pass a quantiser as if it were the identity.

Bengio et al. 2013, "Estimating or Propagating Gradients Through Stochastic Neurons",
arXiv:1308.3432, section 4.
"""

from __future__ import annotations

from typing import Any

import torch


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
        return changed

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        return gradient, None


def straight_through(values: torch.Tensor, changed: torch.Tensor) -> torch.Tensor:
    """Return ``changed`` with the graph of ``values``.

    Args:
        values: with or without a graph.
        changed: what a quantiser made of them, of the same shape, without a graph.
    """
    apply: Any = _StraightThrough.apply  # torch does not type it
    result: torch.Tensor = apply(values, changed.detach())
    return result
