"""Layer normalisation whose backward starts from its output."""

from __future__ import annotations

from typing import Any

import torch
from torch.autograd import Function
from torch.autograd.function import once_differentiable


def invertible_layer_norm(
    states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
) -> torch.Tensor:
    """Normalise over the last dimension, and keep the output for backward instead of the input.

    With y = w n + b the normalised n is (y - b) / w, and the gradient of the input is
    (g - mean(g) - n mean(g n)) / deviation with g = w times the gradient of y (Ba, Kiros, Hinton
    2016, arXiv:1607.06450). Rounding errors of y grow by 1 / w; where w is 0 there is no answer.

    Args:
        states: (..., H).
        weight: (H), nowhere 0.
        bias: (H).
        epsilon: added to variances.
    """
    result: torch.Tensor = _Invertible.apply(states, weight, bias, epsilon)  # type: ignore[no-untyped-call]
    return result


class _Invertible(Function):
    @staticmethod
    def forward(
        ctx: Any, states: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor, epsilon: float
    ) -> torch.Tensor:
        output, _, inverse = torch.native_layer_norm(states, weight.shape, weight, bias, epsilon)
        ctx.save_for_backward(output, weight, bias, inverse)
        return output

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, gradient: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, None]:
        output, weight, bias, inverse = ctx.saved_tensors
        wide = gradient.float() if gradient.dtype != torch.float64 else gradient
        normal = (output.to(wide.dtype) - bias) / weight
        scaled = wide * weight
        mean = scaled.mean(-1, keepdim=True)
        along = (scaled * normal).mean(-1, keepdim=True)
        states = (scaled - mean - normal * along) * inverse.to(wide.dtype)
        rows = tuple(range(wide.dim() - 1))
        return (
            states.to(output.dtype),
            (wide * normal).sum(rows).to(weight.dtype),
            wide.sum(rows).to(bias.dtype),
            None,
        )
