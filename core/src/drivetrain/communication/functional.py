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

from drivetrain.contracts.world.axis import Axis
from drivetrain.contracts.world.collective import Collective, Kind, Op, Purpose, Tag
from drivetrain.contracts.world.communicator import Communicator

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


# -- what a graph contains: one operator for all of them -------------------------------------------

_library = torch.library.Library("drivetrain_functional", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "collective(Tensor x, int line, str kind, int source=0, "
    "SymInt[]? output_splits=None, SymInt[]? input_splits=None) -> Tensor"
)
_collective = torch.ops.drivetrain_functional.collective


def _run(
    x: torch.Tensor,
    line: int,
    kind: str,
    source: int = 0,
    output_splits: Sequence[int] | None = None,
    input_splits: Sequence[int] | None = None,
) -> torch.Tensor:
    f, y = _lines[line], _result(x, line, kind, source, output_splits)
    tensors: tuple[torch.Tensor, ...]
    if kind in (Kind.ALL_REDUCE, Kind.BROADCAST):
        tensors = (y.copy_(x),)
    elif kind == Kind.ALL_TO_ALL:
        tensors = (y, x.contiguous())
    else:
        tensors = (y.view(-1), x.contiguous().view(-1))
    rows = (output_splits, input_splits)
    f.communicator.run(Collective(Kind(kind), tensors, f.axis, f.tag, Op.SUM, False, source, *rows))
    return y


def _result(
    x: torch.Tensor,
    line: int,
    kind: str,
    source: int = 0,
    output_splits: Sequence[int] | None = None,
    input_splits: Sequence[int] | None = None,
) -> torch.Tensor:
    """Memory for the result, of which a compiler needs to know no more than the shape."""
    if kind == Kind.ALL_GATHER:
        rows = x.shape[0] * _lines[line].size
    elif kind == Kind.REDUCE_SCATTER:
        rows = x.shape[0] // _lines[line].size
    elif output_splits is not None:
        rows = sum(output_splits)
    else:
        return torch.empty_like(x, memory_format=torch.contiguous_format)
    return x.new_empty((rows, *x.shape[1:]))


_library.impl("collective", _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake("drivetrain_functional::collective", _result, lib=_library)


# -- what autograd sees ----------------------------------------------------------------------------

_FORWARD: dict[str, Callable[..., torch.Tensor]] = {
    "all_reduce": lambda x, line, size, rank: _collective(x, line, "all_reduce"),
    "reduce": lambda x, line, size, rank: _collective(x, line, "all_reduce"),
    "copy": lambda x, line, size, rank: x.view_as(x),
    "all_gather": lambda x, line, size, rank: _collective(x, line, "all_gather"),
    "gather": lambda x, line, size, rank: _collective(x, line, "all_gather"),
    "reduce_scatter": lambda x, line, size, rank: _collective(x, line, "reduce_scatter"),
    "split": lambda x, line, size, rank: x.chunk(size)[rank].clone(),
    "broadcast": lambda x, line, size, rank, at: _collective(x, line, "broadcast", at),
    # A product, because a compiler would drop an all-reduce whose result is not looked at.
    "sum at": lambda x, line, size, rank, at: _collective(x, line, "all_reduce") * int(rank == at),
    "exchange": lambda x, line, size, rank, to, of: _collective(x, line, "all_to_all", 0, to, of),
    "return": lambda x, line, size, rank, to, of: _collective(x, line, "all_to_all", 0, of, to),
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
