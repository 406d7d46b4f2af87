"""The sum of gradients of a region's input, under way while gradients of weights are computed."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain.communication.functional import Functional
from drivetrain.contracts import DONE, Handle, Purpose, Tag

if TYPE_CHECKING:
    from drivetrain_tensor.products import Kind

MATRIX = 2
"""Dimensions of a matrix; a stack of them has one more."""
_TAG = Tag(Purpose.ACTIVATION, site="tensor parallel input")


class Overlapped:
    """f for one input that several layers multiply, in one forward.

    In backward each layer adds its gradient of the input before it computes that of its weight. The
    last one of them starts the sum over ranks, computes its weight's gradient meanwhile, and waits.
    Where the backward of some layers never comes, f itself sums what there is.

    Args:
        tp: the ranks.
    """

    def __init__(self, tp: Functional) -> None:
        self.tp = tp
        self._layers = self._came = 0
        self._sum: torch.Tensor | None = None
        self._handle: Handle = DONE
        self._begun = False

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        """The input, as layers are to multiply it."""
        y: torch.Tensor = _Enter.apply(x, self)  # type: ignore[no-untyped-call]
        return y

    def product(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kind: Kind
    ) -> torch.Tensor:
        """What :func:`~drivetrain_tensor.layers.product` computes."""
        if kind != "linear":
            weight = weight.mT if weight.dim() == MATRIX else weight.mT.flatten(0, 1)
        self._layers += 1
        y: torch.Tensor = _Product.apply(x, weight, bias, self)  # type: ignore[no-untyped-call]
        return y

    def add(self, gradient: torch.Tensor) -> bool:
        """A layer's gradient of the input; says whether the sum over ranks has begun."""
        self._sum = gradient if self._sum is None else self._sum + gradient
        self._came += 1
        if self._came == self._layers:
            self._begin()
        return self._begun

    def _begin(self) -> None:
        assert self._sum is not None
        self._sum, self._begun = self._sum.contiguous(), True
        communicator, axis = self.tp.communicator, self.tp.axis
        self._handle = communicator.all_reduce(self._sum, axis, _TAG, asynchronous=True)

    def result(self) -> torch.Tensor | None:
        """The sum over ranks, once; what comes after belongs to another backward."""
        if self._sum is None:
            return None
        if not self._begun:
            self._begin()
        self._handle.wait()
        total, self._sum, self._came, self._begun = self._sum, None, 0, False
        return total


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, overlapped: Overlapped) -> torch.Tensor:
        ctx.overlapped = overlapped
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        total = ctx.overlapped.result()
        return (gradient if total is None else total), None


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        overlapped: Overlapped,
    ) -> torch.Tensor:
        ctx.overlapped, ctx.biased = overlapped, bias is not None
        ctx.save_for_backward(x, weight)
        return nn.functional.linear(x, weight, bias)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        ctx.overlapped.add(gradient @ weight)
        flat = gradient.reshape(-1, gradient.shape[-1])
        of_weight = flat.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        of_bias = flat.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
        return None, of_weight, of_bias, None  # that of the input is what f returns
