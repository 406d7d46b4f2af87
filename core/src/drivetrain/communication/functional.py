"""Differentiable collectives that ``torch.compile`` traces as opaque operators.

Every collective is linear, so its backward is its adjoint, which is a collective again. There are
two conventions for what a loss is:

- *summed*: every rank has a loss of its own and the gradient is that of their sum, as with data,
  sequence and expert parallelism. ``all_reduce`` is its own adjoint, ``all_gather`` and
  ``reduce_scatter`` are each other's, ``all_to_all`` is that of the reverse exchange.
- *replicated*: what follows is computed alike on all ranks and has one gradient, as between the
  halves of a tensor-parallel layer. ``copy`` and ``reduce`` are each other's adjoints (f and g in
  Megatron-LM, https://arxiv.org/abs/1909.08053, section 3), and so are ``split`` and ``gather``.

:meth:`Functional.start` splits a collective in two, so that what is computed in between overlaps
with it. The backward of the wait starts the adjoint, and that of the start waits for it, so what
lies in between overlaps in backward as well.

The communicator itself is not traced: decorators and errors are as in eager mode. A compiler drops
operators whose results nobody uses, so every rank must use what a collective returns, or none.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakValueDictionary

import torch

from drivetrain.contracts.world.axis import Axis
from drivetrain.contracts.world.collective import Collective, Kind, Op, Purpose, Tag, axis_name
from drivetrain.contracts.world.communicator import DONE, Communicator, Handle
from drivetrain.errors import CommunicationError

_TAG = Tag(Purpose.ACTIVATION, site="functional")


def functional(communicator: Communicator, axis: Axis, tag: Tag = _TAG) -> Functional:
    """Differentiable collectives over ``axis``; keep the object as long as graphs that use it."""
    return Functional(communicator, axis, tag)


class Started:
    """A collective under way, of which :meth:`wait` gives the result, once.

    Args:
        token: stands for it in the graph.
        shape: of what the collective returns.
        finish: what remains to be done to that.
        arguments: name and arguments of the collective.
    """

    def __init__(
        self,
        token: torch.Tensor,
        shape: tuple[int, ...],
        finish: Callable[[torch.Tensor], torch.Tensor],
        arguments: tuple[Any, ...],
    ) -> None:
        self._token = token
        self._shape = shape
        self._finish = finish
        self._arguments = arguments

    def wait(self) -> torch.Tensor:
        """The result, usable on the current stream.

        Raises:
            CommunicationError: the collective failed, or was waited for before.
        """
        y: torch.Tensor = _Wait.apply(self._token, self._shape, *self._arguments)  # type: ignore[no-untyped-call]
        return self._finish(y)


@dataclass(frozen=True)
class Counts:
    """How many rows an exchange moves; :meth:`Functional.exchange` takes both, or both swapped.

    Args:
        sent: rows that go to each rank.
        received: rows that come from each rank.
        table: [size, k] on the device: the counts that each rank has given for this one.
    """

    sent: list[int]
    received: list[int]
    table: torch.Tensor


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
        y = self._apply("exchange", x.movedim(split_dim, 0), None, None)
        return self._joined(y, split_dim % x.dim(), concat_dim % x.dim())

    def exchange(
        self, x: torch.Tensor, output_splits: Sequence[int], input_splits: Sequence[int]
    ) -> torch.Tensor:
        """All-to-all of unequal slices of dimension 0; ``splits[i]`` rows come from / go to i."""
        return self._apply("exchange", x, list(output_splits), list(input_splits))

    def counts(self, counts: torch.Tensor, rows: int) -> Counts:
        """Exchange how many rows go where, for :meth:`exchange`. Collective; not traced.

        It waits for the device once, and moves (k + 1) * 8 bytes from each rank to each.

        Args:
            counts: whole numbers [size] or [size, k] on the device: ``counts[i]`` rows go to rank
                i, in k parts, such as one for each of its experts.
            rows: the rows that there are to send, which the counts must add up to.

        Raises:
            CommunicationError: on every rank, if the counts of one are negative or do not add up.
        """
        if counts.is_floating_point() or counts.shape[:1] != (self.size,) or counts.dim() > 2:
            raise CommunicationError(
                f"counts of shape {tuple(counts.shape)} and {counts.dtype} are not whole numbers "
                f"for {self.size} ranks"
            )
        own = counts.detach().reshape(self.size, -1).long()
        # What is wrong travels along, so that every rank learns of it in the same exchange.
        wrong = (own.sum() != rows) | (own < 0).any()
        sent = torch.cat([own, wrong.long().expand(self.size, 1)], 1)
        came = torch.empty_like(sent)
        tag = Tag(Purpose.CONTROL, self.tag.key, self.tag.site)
        self.communicator.all_to_all(came, sent, self.axis, tag)
        table = came[:, :-1]
        known = torch.stack([own.sum(1), table.sum(1), came[:, -1]]).tolist()
        if any(known[2]):
            at = [position for position, is_wrong in enumerate(known[2]) if is_wrong]
            mine = f"; here {rows} rows, counts {own.tolist()}" if self.rank in at else ""
            raise CommunicationError(
                f"counts of {tag} over {axis_name(self.axis)!r} are negative or do not add up to "
                f"the rows that are sent, at position {', '.join(map(str, at))}{mine}"
            )
        return Counts(known[0], known[1], table)

    def start(self, name: str, x: torch.Tensor, dim: int = 0) -> Started:
        """Start ``all_reduce``, ``reduce``, ``all_gather``, ``gather`` or ``reduce_scatter``.

        All ranks start and wait for the same ones in the same order. ``x`` must not be changed
        before the wait.
        """
        if name not in _STARTED:
            raise ValueError(f"there is no {name!r} to start; choose from {', '.join(_STARTED)}")
        return self._start(name, x.movedim(dim, 0), lambda y: y.movedim(0, dim))

    def start_all_to_all(self, x: torch.Tensor, split_dim: int = 0, concat_dim: int = 0) -> Started:
        """Start :meth:`all_to_all`."""
        split_dim, concat_dim = split_dim % x.dim(), concat_dim % x.dim()
        finish = partial(self._joined, split_dim=split_dim, concat_dim=concat_dim)
        return self._start("exchange", x.movedim(split_dim, 0), finish, None, None)

    def start_exchange(
        self, x: torch.Tensor, output_splits: Sequence[int], input_splits: Sequence[int]
    ) -> Started:
        """Start :meth:`exchange`."""
        return self._start("exchange", x, lambda y: y, list(output_splits), list(input_splits))

    def _start(
        self,
        name: str,
        x: torch.Tensor,
        finish: Callable[[torch.Tensor], torch.Tensor],
        *arguments: Any,
    ) -> Started:
        place = (self._line, self.size, self.rank)
        token: torch.Tensor = _Start.apply(x, name, *place, *arguments)  # type: ignore[no-untyped-call]
        kind, output_splits, _ = _plain(name, arguments)
        shape = _shape(x, kind, self.size, output_splits)
        return Started(token, shape, finish, (name, *place, *arguments))

    def _joined(self, y: torch.Tensor, split_dim: int, concat_dim: int) -> torch.Tensor:
        """What :meth:`all_to_all` returns, of slices that came one after the other."""
        pieces = y.view(self.size, -1, *y.shape[1:]).movedim(1, 1 + split_dim)
        return pieces.movedim(0, concat_dim).flatten(concat_dim, concat_dim + 1)

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


# -- what a graph contains: one operator for all of them, two for those that overlap ---------------

_library = torch.library.Library("drivetrain_functional", "DEF")  # type: ignore[no-untyped-call]
_library.define(  # type: ignore[no-untyped-call]
    "collective(Tensor x, int line, str kind, int source=0, "
    "SymInt[]? output_splits=None, SymInt[]? input_splits=None) -> Tensor"
)
_library.define(  # type: ignore[no-untyped-call]
    "start(Tensor x, int line, str kind, SymInt[]? output_splits=None, "
    "SymInt[]? input_splits=None) -> Tensor"
)
_library.define("wait(Tensor token, SymInt[] shape) -> Tensor")  # type: ignore[no-untyped-call]
_collective = torch.ops.drivetrain_functional.collective
_begin = torch.ops.drivetrain_functional.start
_end = torch.ops.drivetrain_functional.wait


def _run(
    x: torch.Tensor,
    line: int,
    kind: str,
    source: int = 0,
    output_splits: Sequence[int] | None = None,
    input_splits: Sequence[int] | None = None,
) -> torch.Tensor:
    y, _ = _issue(x, line, kind, source, output_splits, input_splits, asynchronous=False)
    return y


def _issue(
    x: torch.Tensor,
    line: int,
    kind: str,
    source: int,
    output_splits: Sequence[int] | None,
    input_splits: Sequence[int] | None,
    *,
    asynchronous: bool,
) -> tuple[torch.Tensor, Handle]:
    f, y = _lines[line], _result(x, line, kind, source, output_splits)
    tensors: tuple[torch.Tensor, ...]
    if kind in (Kind.ALL_REDUCE, Kind.BROADCAST):
        tensors = (y.copy_(x),)
    elif kind == Kind.ALL_TO_ALL:
        tensors = (y, x.contiguous())
    else:
        tensors = (y.view(-1), x.contiguous().view(-1))
    rest = (asynchronous, source, output_splits, input_splits)
    return y, f.communicator.run(Collective(Kind(kind), tensors, f.axis, f.tag, Op.SUM, *rest))


def _result(
    x: torch.Tensor,
    line: int,
    kind: str,
    source: int = 0,
    output_splits: Sequence[int] | None = None,
    input_splits: Sequence[int] | None = None,
) -> torch.Tensor:
    """Memory for the result, of which a compiler needs to know no more than the shape."""
    return x.new_empty(_shape(x, kind, _lines[line].size, output_splits))


def _shape(
    x: torch.Tensor, kind: str, size: int, output_splits: Sequence[int] | None
) -> tuple[int, ...]:
    if kind == Kind.ALL_GATHER:
        rows = x.shape[0] * size
    elif kind in (Kind.REDUCE_SCATTER, "split"):
        rows = x.shape[0] // size
    elif output_splits is not None:
        rows = sum(output_splits)
    else:
        return tuple(x.shape)
    return (rows, *x.shape[1:])


# What is under way, by the memory of the token that stands for it: its gradient is a token as well,
# of the same shape and device, so that autograd orders both ways as it orders other work.
_under_way: dict[int, tuple[torch.Tensor, Handle]] = {}


def _start(
    x: torch.Tensor,
    line: int,
    kind: str,
    output_splits: Sequence[int] | None = None,
    input_splits: Sequence[int] | None = None,
) -> torch.Tensor:
    token = x.new_empty(1)
    if kind in ("copy", "split"):
        f = _lines[line]
        y, handle = (x if kind == "copy" else x.chunk(f.size)[f.rank]).clone(), DONE
    else:
        rows = (output_splits, input_splits)
        y, handle = _issue(x, line, kind, 0, *rows, asynchronous=True)
    if not token.is_meta:  # which has no memory, and no collectives either
        _under_way[token.data_ptr()] = (y, handle)
    return token


def _wait(token: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    if token.is_meta:
        return token.new_empty(shape)
    if token.data_ptr() not in _under_way:
        raise CommunicationError("a collective that was started is waited for a second time")
    y, handle = _under_way.pop(token.data_ptr())
    handle.wait()
    return y


_library.impl("collective", _run, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
# A compiler's tensors need a shape alone; those of a rehearsal, a communicator that counts them.
torch.library.register_fake(
    "drivetrain_functional::collective",
    lambda x, *given: (_run if x.is_meta else _result)(x, *given),
    lib=_library,
)
_library.impl("start", _start, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
_library.impl("wait", _wait, "CompositeExplicitAutograd")  # type: ignore[no-untyped-call]
torch.library.register_fake(
    "drivetrain_functional::start",
    lambda x, *given: _start(x, *given) if x.is_meta else x.new_empty(1),
    lib=_library,
)
torch.library.register_fake(
    "drivetrain_functional::wait", lambda token, shape: token.new_empty(shape), lib=_library
)


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


_STARTED = {
    "all_reduce": "all_reduce",
    "reduce": "all_reduce",
    "all_gather": "all_gather",
    "gather": "all_gather",
    "reduce_scatter": "reduce_scatter",
}

_KINDS = _STARTED | {
    "copy": "copy",
    "split": "split",
    "exchange": "all_to_all",
    "return": "all_to_all",
}


def _plain(
    name: str, splits: Sequence[Any]
) -> tuple[str, Sequence[int] | None, Sequence[int] | None]:
    """Kind, output splits and input splits of a collective by name."""
    output_splits, input_splits = splits or (None, None)
    if name == "return":
        output_splits, input_splits = input_splits, output_splits
    return _KINDS[name], output_splits, input_splits


class _Start(torch.autograd.Function):
    """Tensor to token; its backward waits for what the backward of :class:`_Wait` has started."""

    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, name: str, *arguments: Any) -> Any:
        ctx.shape, ctx.name, ctx.arguments = tuple(x.shape), name, arguments
        kind, output_splits, input_splits = _plain(name, arguments[3:])
        return _begin(x, arguments[0], kind, output_splits, input_splits)

    @staticmethod
    def backward(ctx: Any, *tokens: torch.Tensor) -> Any:
        adjoint = _ADJOINT[ctx.name]
        gradient = _Wait.apply(tokens[0], ctx.shape, adjoint, *ctx.arguments)  # type: ignore[no-untyped-call]
        return gradient, None, *(None for _ in ctx.arguments)


class _Wait(torch.autograd.Function):
    """Token to result; its backward starts the adjoint."""

    @staticmethod
    def forward(
        ctx: Any, token: torch.Tensor, shape: Sequence[int], name: str, *arguments: Any
    ) -> Any:
        ctx.name, ctx.arguments = name, arguments
        return _end(token, shape)

    @staticmethod
    def backward(ctx: Any, *gradients: torch.Tensor) -> Any:
        token = _Start.apply(gradients[0], _ADJOINT[ctx.name], *ctx.arguments)  # type: ignore[no-untyped-call]
        return token, None, None, *(None for _ in ctx.arguments)
