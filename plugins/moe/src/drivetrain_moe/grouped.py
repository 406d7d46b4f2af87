"""One matrix product for each expert, over tokens in their order; or two, with what is between.

[Note: one expert after another] On a host a whole feed-forward expert is computed before the next
one begins: what its rows become between two products is still in the cache then, in forward and in
backward. Gradients of weights are written in place, and nothing is added up that could be written.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.nn import functional

aten = torch.ops.aten


@dataclass(frozen=True)
class Activation:
    """A function of single numbers, and its derivative, written into memory that is there.

    Args:
        call: the function.
        into: (x, out) writes it.
        backward: (gradient, x, out) writes the gradient of x; ``out`` may be ``gradient``.
    """

    call: Callable[[torch.Tensor], torch.Tensor]
    into: Callable[[torch.Tensor, torch.Tensor], Any]
    backward: Callable[[torch.Tensor, torch.Tensor, torch.Tensor], Any]


def _gelu(approximate: str) -> Activation:
    return Activation(
        partial(functional.gelu, approximate=approximate),
        lambda x, out: aten.gelu.out(x, approximate=approximate, out=out),
        lambda gradient, x, out: aten.gelu_backward.grad_input(
            gradient, x, approximate=approximate, grad_input=out
        ),
    )


ACTIVATIONS: dict[str, Activation] = {
    "gelu": _gelu("none"),
    "gelu_tanh": _gelu("tanh"),
    "relu": Activation(
        functional.relu,
        lambda x, out: aten.relu.out(x, out=out),
        lambda gradient, x, out: aten.threshold_backward.grad_input(gradient, x, 0, grad_input=out),
    ),
    "silu": Activation(
        functional.silu,
        lambda x, out: aten.silu.out(x, out=out),
        lambda gradient, x, out: aten.silu_backward.grad_input(gradient, x, grad_input=out),
    ),
}


@dataclass(frozen=True)
class Shape:
    """How feed-forward experts in fused tensors compute.

    Args:
        activation: between the products, one of :data:`ACTIVATIONS`.
        gated: whether the activation of the first half of the first product multiplies the other.
        outputs_first: whether weights are [E, out, in], as ``nn.Linear`` has them, or [E, in, out].
    """

    activation: str
    gated: bool = True
    outputs_first: bool = False


def grouped_mlp(
    x: torch.Tensor,
    up: torch.Tensor,
    down: torch.Tensor,
    counts: torch.Tensor,
    shape: Shape,
    up_bias: torch.Tensor | None = None,
    down_bias: torch.Tensor | None = None,
) -> torch.Tensor:
    """Compute tokens by feed-forward experts.

    Args:
        x: [n, d], tokens in order of experts.
        up: weight of the first product, for widths d -> f, or 2 f if gated.
        down: weight of the second product, for widths f -> d.
        counts: [E] on the device, tokens of each expert; they add up to n.
        shape: what lies between the products, and how weights lie in memory.
        up_bias: [E, f], or [E, 2 f].
        down_bias: [E, d].

    Returns:
        [n, d].
    """
    if x.device.type == "cpu":
        if torch.is_autocast_enabled("cpu"):
            x = x.to(torch.get_autocast_dtype("cpu"))
        apply: Any = _Chain.apply  # torch does not type it
        biases = [None if b is None else b.to(x.dtype) for b in (up_bias, down_bias)]
        y: torch.Tensor = apply(
            x, up.to(x.dtype), down.to(x.dtype), *biases, counts.tolist(), shape
        )
        return y
    if shape.outputs_first:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    hidden = grouped_linear(x, up, counts, up_bias)
    act = ACTIVATIONS[shape.activation].call
    if shape.gated:
        gate, other = hidden.chunk(2, dim=-1)
        hidden = act(gate) * other
    else:
        hidden = act(hidden)
    return grouped_linear(hidden, down, counts, down_bias)


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


class _Chain(torch.autograd.Function):
    """Feed-forward experts; see [Note: one expert after another]."""

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        up: torch.Tensor,
        down: torch.Tensor,
        up_bias: torch.Tensor | None,
        down_bias: torch.Tensor | None,
        counts: list[int],
        shape: Shape,
    ) -> torch.Tensor:
        wide, width = (1, 2) if shape.outputs_first else (2, 1)
        hidden = x.new_empty(x.shape[0], up.shape[wide])
        inner = x.new_empty(x.shape[0], down.shape[3 - wide])
        y = x.new_empty(x.shape[0], down.shape[3 - width])
        act = ACTIVATIONS[shape.activation]
        for e, rows in enumerate(_slices(counts)):
            if rows.start == rows.stop:
                continue
            h, a, out = hidden[rows], inner[rows], y[rows]
            _product(x[rows], up[e], up_bias, e, shape.outputs_first, h)
            if shape.gated:
                gate, other = h.chunk(2, dim=1)
                act.into(gate, a)
                a.mul_(other)
            else:
                act.into(h, a)
            _product(a, down[e], down_bias, e, shape.outputs_first, out)
        ctx.save_for_backward(x, up, down, up_bias, down_bias, hidden, inner)
        ctx.counts, ctx.shape = counts, shape
        return y

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        *inputs, hidden, inner = ctx.saved_tensors
        shape, gradient, needs = ctx.shape, gradients[0].contiguous(), ctx.needs_input_grad[:5]
        if torch.is_grad_enabled():  # what is returned is to be differentiated again
            return *_recorded(inputs, ctx.counts, shape, gradient, needs), None, None
        x, up, down, *_ = inputs
        act = ACTIVATIONS[shape.activation]
        found = [
            torch.empty_like(tensor) if needed else None
            for tensor, needed in zip(inputs, needs, strict=True)
        ]
        to_x, to_up, to_down, to_up_bias, to_down_bias = found
        most = max(ctx.counts, default=0)
        to_inner, to_hidden = inner.new_empty(most, inner.shape[1]), torch.empty_like(hidden[:most])
        # The other way round than forward, whose last expert is the one that is still in a cache.
        for e, rows in reversed(list(enumerate(_slices(ctx.counts)))):
            g, h, a, count = gradient[rows], hidden[rows], inner[rows], rows.stop - rows.start
            to_a, to_h = to_inner[:count], to_hidden[:count]
            _to_weight(a, g, to_down, to_down_bias, e, shape.outputs_first)
            torch.mm(g, down[e] if shape.outputs_first else down[e].t(), out=to_a)
            if shape.gated:
                gate, other = h.chunk(2, dim=1)
                to_gate, to_other = to_h.chunk(2, dim=1)
                act.into(gate, to_other)  # for a moment
                torch.mul(to_a, other, out=to_gate)
                to_other.mul_(to_a)
                act.backward(to_gate, gate, to_gate)
            else:
                act.backward(to_a, h, to_h)
            _to_weight(x[rows], to_h, to_up, to_up_bias, e, shape.outputs_first)
            if to_x is not None:
                torch.mm(to_h, up[e] if shape.outputs_first else up[e].t(), out=to_x[rows])
        return *found, None, None


def _recorded(
    inputs: Sequence[torch.Tensor | None],
    counts: list[int],
    shape: Shape,
    gradient: torch.Tensor,
    needs: Sequence[bool],
) -> tuple[torch.Tensor | None, ...]:
    """The gradients of :class:`_Chain`, made of operations that autograd records.

    They are those of views, which no other input leads to: one input may be another, or be made of
    it, and autograd adds up itself what comes through each.
    """
    x, up, down, up_bias, down_bias = views = [t if t is None else t.view_as(t) for t in inputs]
    assert x is not None, "only biases may be missing"
    assert up is not None, "only biases may be missing"
    assert down is not None, "only biases may be missing"
    act, outputs = ACTIVATIONS[shape.activation].call, []
    for e, rows in enumerate(torch.split(x, counts)):
        first, second = (w[e].t() if shape.outputs_first else w[e] for w in (up, down))
        hidden = rows @ first if up_bias is None else rows @ first + up_bias[e]
        if shape.gated:
            gate, other = hidden.chunk(2, dim=1)
            hidden = act(gate) * other
        else:
            hidden = act(hidden)
        out = hidden @ second
        outputs.append(out if down_bias is None else out + down_bias[e])
    wanted = [v for v, needed in zip(views, needs, strict=True) if v is not None and needed]
    found = iter(torch.autograd.grad(torch.cat(outputs), wanted, gradient, create_graph=True))
    return tuple(next(found) if needed else None for needed in needs)


def _slices(counts: list[int]) -> list[slice]:
    ends = list(itertools.accumulate(counts))
    return [slice(end - count, end) for end, count in zip(ends, counts, strict=True)]


def _product(
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    expert: int,
    outputs_first: bool,
    out: torch.Tensor,
) -> None:
    weight = weight.t() if outputs_first else weight
    if bias is None:
        torch.mm(x, weight, out=out)
    else:
        torch.addmm(bias[expert], x, weight, out=out)


def _to_weight(
    x: torch.Tensor,
    gradient: torch.Tensor,
    weights: torch.Tensor | None,
    biases: torch.Tensor | None,
    expert: int,
    outputs_first: bool,
) -> None:
    """Write the gradients of one expert's weight and bias; zeros, if it has no rows."""
    if weights is not None:
        first, second = (gradient, x) if outputs_first else (x, gradient)
        torch.mm(first.t(), second, out=weights[expert])
    if biases is not None:
        torch.sum(gradient, 0, out=biases[expert])
