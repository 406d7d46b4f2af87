"""What goes into and out of regions under way, while layers at their beginning multiply.

In backward the gradient of a region's input is summed over ranks while the gradient of a weight is
computed. Where ranks share out sequences, that sum is a reduce-scatter; and in forward the first
layer multiplies the tokens that are there while the others come, in chunks (Wang et al. 2023,
https://doi.org/10.1145/3567955.3567959, section 5: a collective in parts beside the product).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from drivetrain.communication.functional import Functional
from drivetrain.contracts import DONE, Handle, Purpose, Tag

if TYPE_CHECKING:
    from drivetrain_tensor.products import Kind
    from drivetrain_tensor.sequence import SequenceParts

MATRIX = 2
"""Dimensions of a matrix; a stack of them has one more."""
_CHUNKS = 2
"""Gathers in which the tokens of a sequence come."""
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

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """What a layer returns, for its input [..., in] and a matrix [out, in]."""
        return nn.functional.linear(x, weight, bias)

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
        self._begun = True
        self._sum, self._handle = self._started(self._sum)

    def _started(self, terms: torch.Tensor) -> tuple[torch.Tensor, Handle]:
        """Memory of the sum over ranks of terms, and what is waited for."""
        total, communicator = terms.contiguous(), self.tp.communicator
        return total, communicator.all_reduce(total, self.tp.axis, _TAG, asynchronous=True)

    def _finished(self, total: torch.Tensor) -> torch.Tensor:
        """The gradient of what came in."""
        return total

    def result(self) -> torch.Tensor | None:
        """The sum over ranks, once; what comes after belongs to another backward."""
        if self._sum is None:
            return None
        if not self._begun:
            self._begin()
        self._handle.wait()
        total, self._sum, self._came, self._begun = self._sum, None, 0, False
        return self._finished(total)


class OverlappedParts(Overlapped):
    """The same for this rank's part of a sequence, of which layers multiply all.

    Args:
        parts: how the sequence is shared out.
        dim: that tokens lie along.
    """

    def __init__(self, parts: SequenceParts, dim: int) -> None:
        super().__init__(parts.tp)
        self._parts, self._dim = parts, dim
        self._arriving: list[tuple[int, torch.Tensor, Handle]] = []

    def begin(self, part: torch.Tensor) -> torch.Tensor:
        """Start to gather; returns memory for all tokens, in which only this rank's are."""
        parts, dim = self._parts, self._dim
        rows = nn.functional.pad(part.movedim(dim, -1), (0, parts.size - part.shape[dim]))
        rows = rows.movedim(-1, 0).contiguous()
        for first in range(0, parts.size, -(-parts.size // _CHUNKS)):
            chunk = rows[first : first + -(-parts.size // _CHUNKS)]
            every = chunk.new_empty(parts.tp.size, *chunk.shape)
            handle = parts.tp.communicator.all_gather(
                every.view(-1), chunk.view(-1), parts.tp.axis, parts.tp.tag, asynchronous=True
            )
            self._arriving.append((first, every, handle))
        shape = list(part.shape)
        shape[dim] = parts.extent
        whole = part.new_empty(shape)
        whole.narrow(dim, parts.start, parts.length).copy_(part)
        return whole

    def multiply(
        self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None
    ) -> torch.Tensor:
        """The first layer multiplies tokens as they come, and puts them into ``x``."""
        if not self._arriving:
            return super().multiply(x, weight, bias)
        y = x.new_empty(*x.shape[:-1], weight.shape[0])
        parts, dim = self._parts, self._dim

        def fill(start: int, length: int) -> None:
            own = x.narrow(dim, start, length)
            y.narrow(dim, start, length).copy_(nn.functional.linear(own, weight, bias))

        if parts.length:
            fill(parts.start, parts.length)
        for first, every, handle in self._arriving:
            handle.wait()
            for rank, chunk in enumerate(every):
                start = rank * parts.size + first
                length = min(chunk.shape[0], parts.extent - start)
                if rank != parts.tp.rank and length > 0:
                    x.narrow(dim, start, length).copy_(chunk[:length].movedim(0, dim))
                    fill(start, length)
        self._arriving = []
        return y

    def enter(self, x: torch.Tensor) -> torch.Tensor:
        y: torch.Tensor = _Gather.apply(x, self)  # type: ignore[no-untyped-call]
        return y

    def _started(self, terms: torch.Tensor) -> tuple[torch.Tensor, Handle]:
        parts = self._parts
        missing = parts.size * parts.tp.size - parts.extent
        rows = nn.functional.pad(terms.movedim(self._dim, -1), (0, missing))
        rows = rows.movedim(-1, 0).contiguous()
        total = rows.new_empty(parts.size, *rows.shape[1:])
        communicator = parts.tp.communicator
        return total, communicator.reduce_scatter(
            total.view(-1), rows.view(-1), parts.tp.axis, _TAG, asynchronous=True
        )

    def _finished(self, total: torch.Tensor) -> torch.Tensor:
        return total[: self._parts.length].movedim(0, self._dim).contiguous()


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


class _Gather(torch.autograd.Function):
    """A part to the whole."""

    @staticmethod
    def forward(ctx: Any, part: torch.Tensor, overlapped: OverlappedParts) -> torch.Tensor:
        ctx.overlapped, ctx.shape = overlapped, part.shape
        return overlapped.begin(part)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        total = ctx.overlapped.result()
        return (gradient.new_zeros(ctx.shape) if total is None else total), None


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
        y = overlapped.multiply(x, weight, bias)
        ctx.save_for_backward(x, weight)
        return y

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        x, weight = ctx.saved_tensors
        ctx.overlapped.add(gradient @ weight)
        flat = gradient.reshape(-1, gradient.shape[-1])
        of_weight = flat.T @ x.reshape(-1, x.shape[-1]) if ctx.needs_input_grad[1] else None
        of_bias = flat.sum(0) if ctx.biased and ctx.needs_input_grad[2] else None
        return None, of_weight, of_bias, None  # that of the input is what f returns
