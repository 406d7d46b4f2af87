"""Differentiable collectives that ``torch.compile`` traces as opaque operators.

Every collective is linear, so its backward is its adjoint, which is a collective again. There are
two conventions for what a loss is:

- *summed*: every rank has a loss of its own and the gradient is that of their sum, as with data,
  sequence and expert parallelism. ``all_reduce`` is its own adjoint, ``all_gather`` and
  ``reduce_scatter`` are each other's, ``all_to_all`` is that of the reverse exchange.
- *replicated*: what follows is computed alike on all ranks and has one gradient, as between the
  halves of a tensor-parallel layer. ``copy`` and ``reduce`` are each other's adjoints (f and g in
  Megatron-LM, https://arxiv.org/abs/1909.08053, section 3), and so are ``split`` and ``gather``.

The communicator itself is not traced: decorators and errors are as in eager mode. A compiler drops
operators whose results nobody uses, so every rank must use what a collective returns, or none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import Any
from weakref import WeakValueDictionary

import torch

from drivetrain.communicator import Communicator, Purpose, Tag
from drivetrain.mesh_layout import Axis

_TAG = Tag(Purpose.ACTIVATION, site="functional")


def functional(communicator: Communicator, axis: Axis, tag: Tag = _TAG) -> Functional:
    """Differentiable collectives over ``axis``; keep the object as long as graphs that use it."""
    return Functional(communicator, axis, tag)


class Functional:
    """Differentiable collectives over one axis; made by :func:`functional`.

    None of them changes its argument. Over an axis of one rank all of them are the identity.
    """

    def __init__(self, communicator: Communicator, axis: Axis, tag: Tag) -> None:
        self.communicator = communicator
        self.axis = axis
        self.tag = tag
        self.size = communicator.size(axis)
        self.rank = communicator.rank(axis)
        self._line = next(_numbers)
        _lines[self._line] = self

    def all_reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks; gradients are summed over ranks."""
        return self._apply("all_reduce", x)

    def reduce(self, x: torch.Tensor) -> torch.Tensor:
        """Sum over ranks, into a replicated value: the gradient passes through."""
        return self._apply("reduce", x)

    def copy(self, x: torch.Tensor) -> torch.Tensor:
        """The value itself, replicated: gradients are summed over ranks."""
        return self._apply("copy", x)

    def all_gather(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Concatenate along ``dim``; of the gradients, this rank's slice is summed over ranks."""
        return self._along("all_gather", x, dim)

    def gather(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Concatenate along ``dim`` into a replicated value: the gradient is this rank's slice."""
        return self._along("gather", x, dim)

    def reduce_scatter(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """Sum over ranks and keep this rank's slice of ``dim``; gradients are gathered."""
        return self._along("reduce_scatter", x, dim)

    def split(self, x: torch.Tensor, dim: int = 0) -> torch.Tensor:
        """This rank's slice of a replicated value along ``dim``; gradients are gathered."""
        return self._along("split", x, dim)

    def broadcast(self, x: torch.Tensor, source: int = 0) -> torch.Tensor:
        """The value at position ``source``; gradients are summed there and zero elsewhere."""
        return self._apply("broadcast", x, source)

    def all_to_all(self, x: torch.Tensor, split_dim: int = 0, concat_dim: int = 0) -> torch.Tensor:
        """Send even slice i of ``split_dim`` to rank i; join what comes along ``concat_dim``."""
        split_dim, concat_dim = split_dim % x.dim(), concat_dim % x.dim()
        y = self._apply("exchange", x.movedim(split_dim, 0), None, None)
        pieces = y.view(self.size, -1, *y.shape[1:]).movedim(1, 1 + split_dim)
        return pieces.movedim(0, concat_dim).flatten(concat_dim, concat_dim + 1)

    def exchange(
        self, x: torch.Tensor, output_splits: Sequence[int], input_splits: Sequence[int]
    ) -> torch.Tensor:
        """All-to-all of unequal slices of dimension 0; ``splits[i]`` rows come from / go to i."""
        return self._apply("exchange", x, list(output_splits), list(input_splits))

    def _apply(self, name: str, x: torch.Tensor, *arguments: Any) -> torch.Tensor:
        place = (self._line, self.size, self.rank)
        y: torch.Tensor = _Linear.apply(x, name, *place, *arguments)  # type: ignore[no-untyped-call]
        return y

    def _along(self, name: str, x: torch.Tensor, dim: int) -> torch.Tensor:
        if dim == 0:
            return self._apply(name, x)
        return self._apply(name, x.movedim(dim, 0)).movedim(0, dim)


# What a graph holds of a collective is a number, so that it can be an operator's argument.
_lines: WeakValueDictionary[int, Functional] = WeakValueDictionary()
_numbers = itertools.count()


# -- operators: what a graph contains --------------------------------------------------------------

_library = torch.library.Library("drivetrain_functional", "DEF")  # type: ignore[no-untyped-call]
_ops = torch.ops.drivetrain_functional


def _all_reduce(x: torch.Tensor, line: int) -> torch.Tensor:
    f, y = _lines[line], x.clone(memory_format=torch.contiguous_format)
    f.communicator.all_reduce(y, f.axis, f.tag)
    return y


def _all_gather(x: torch.Tensor, line: int) -> torch.Tensor:
    f, y = _lines[line], _gathered(x, line)
    f.communicator.all_gather(y.view(-1), x.contiguous().view(-1), f.axis, f.tag)
    return y


def _reduce_scatter(x: torch.Tensor, line: int) -> torch.Tensor:
    f, y = _lines[line], _scattered(x, line)
    f.communicator.reduce_scatter(y.view(-1), x.contiguous().view(-1), f.axis, f.tag)
    return y


def _broadcast(x: torch.Tensor, line: int, source: int) -> torch.Tensor:
    f, y = _lines[line], x.clone(memory_format=torch.contiguous_format)
    f.communicator.broadcast(y, f.axis, f.tag, source=source)
    return y


def _all_to_all(
    x: torch.Tensor,
    line: int,
    output_splits: Sequence[int] | None,
    input_splits: Sequence[int] | None,
) -> torch.Tensor:
    f, y = _lines[line], _exchanged(x, line, output_splits, input_splits)
    f.communicator.all_to_all(
        y, x.contiguous(), f.axis, f.tag, output_splits=output_splits, input_splits=input_splits
    )
    return y


def _same(x: torch.Tensor, *_: object) -> torch.Tensor:
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _gathered(x: torch.Tensor, line: int) -> torch.Tensor:
    return x.new_empty((x.shape[0] * _lines[line].size, *x.shape[1:]))


def _scattered(x: torch.Tensor, line: int) -> torch.Tensor:
    return x.new_empty((x.shape[0] // _lines[line].size, *x.shape[1:]))


def _exchanged(
    x: torch.Tensor, line: int, output_splits: Sequence[int] | None, _: object
) -> torch.Tensor:
    return x.new_empty((x.shape[0] if output_splits is None else sum(output_splits), *x.shape[1:]))


for _schema, _implementation, _shape in (
    ("all_reduce(Tensor x, int line)", _all_reduce, _same),
    ("all_gather(Tensor x, int line)", _all_gather, _gathered),
    ("reduce_scatter(Tensor x, int line)", _reduce_scatter, _scattered),
    ("broadcast(Tensor x, int line, int source)", _broadcast, _same),
    (
        "all_to_all(Tensor x, int line, SymInt[]? output_splits, SymInt[]? input_splits)",
        _all_to_all,
        _exchanged,
    ),
):
    _name = _library.define(f"{_schema} -> Tensor")  # type: ignore[no-untyped-call]
    _library.impl(_name, _implementation, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
    torch.library.register_fake(f"drivetrain_functional::{_name}", _shape, lib=_library)


# -- what autograd sees ----------------------------------------------------------------------------

_FORWARD: dict[str, Callable[..., torch.Tensor]] = {
    "all_reduce": lambda x, line, size, rank: _ops.all_reduce(x, line),
    "reduce": lambda x, line, size, rank: _ops.all_reduce(x, line),
    "copy": lambda x, line, size, rank: x.view_as(x),
    "all_gather": lambda x, line, size, rank: _ops.all_gather(x, line),
    "gather": lambda x, line, size, rank: _ops.all_gather(x, line),
    "reduce_scatter": lambda x, line, size, rank: _ops.reduce_scatter(x, line),
    "split": lambda x, line, size, rank: x.chunk(size)[rank].clone(),
    "broadcast": lambda x, line, size, rank, source: _ops.broadcast(x, line, source),
    # A product, because a compiler would drop an all-reduce whose result is not looked at.
    "sum at": lambda x, line, size, rank, source: _ops.all_reduce(x, line) * int(rank == source),
    "exchange": lambda x, line, size, rank, come, go: _ops.all_to_all(x, line, come, go),
    "return": lambda x, line, size, rank, come, go: _ops.all_to_all(x, line, go, come),
}

_ADJOINT = {
    "all_reduce": "all_reduce",
    "reduce": "copy",
    "copy": "reduce",
    "all_gather": "reduce_scatter",
    "reduce_scatter": "all_gather",
    "gather": "split",
    "split": "gather",
    "broadcast": "sum at",
    "sum at": "broadcast",
    "exchange": "return",
    "return": "exchange",
}


class _Linear(torch.autograd.Function):
    """A collective by name; its backward is the one that is called its adjoint."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, *arguments: Any) -> Any:
        ctx.name, ctx.arguments = name, arguments
        return _FORWARD[name](x, *arguments)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        adjoint = _ADJOINT[ctx.name]
        gradient = _Linear.apply(gradients[0], adjoint, *ctx.arguments)  # type: ignore[no-untyped-call]
        return gradient, None, *(None for _ in ctx.arguments)
