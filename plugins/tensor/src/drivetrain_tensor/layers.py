"""Layers of which each rank has a part. They take over the class of the client's layer.

The module objects, their names and their attributes stay, so hooks and references to them go on
to work. f and g are those of Megatron-LM (https://arxiv.org/abs/1909.08053, section 3): f is the
identity whose gradient is summed, g a sum whose gradient passes.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import nn

from drivetrain.communication.functional import Functional
from drivetrain_tensor import halves
from drivetrain_tensor.lazy_tensor import LazyTensor, lazy, part_of, plain
from drivetrain_tensor.overlap import MATRIX, Overlapped, OverlappedParts
from drivetrain_tensor.sequence import SequenceParts, summed

if TYPE_CHECKING:
    from drivetrain.job.random_streams import RandomStreams
    from drivetrain_tensor.products import Kind

STREAM = "tensor parallel dropout"
"""What is drawn inside of a region, where ranks have other activations."""


class Shared:
    """Something that copies of a module have in common."""

    def __deepcopy__(self, memo: dict[int, Any]) -> Shared:
        return self


class Entered(NamedTuple):
    """What has come into a region.

    Args:
        x: the tensor, which a model may change in place between two layers that read it.
        version: what torch counts such changes with.
        y: the tensor as layers multiply it.
        overlapped: the sum of its gradients, if that is not autograd's.
    """

    x: torch.Tensor
    version: int
    y: torch.Tensor
    overlapped: Overlapped | None


class Lane(Shared):
    """One region while it computes: what its layers share.

    Args:
        tp: collectives over the ranks.
        random: the job's streams; ``None`` if all ranks draw alike in it.
        overlap: whether gradients of weights are computed while those of inputs are summed.
        in_parts: whether ranks share out the sequence behind it.
    """

    def __init__(
        self,
        tp: Functional,
        random: RandomStreams | None,
        *,
        overlap: bool = False,
        in_parts: bool = False,
    ) -> None:
        self.tp, self.random, self.overlap, self.in_parts = tp, random, overlap, in_parts
        self._stacks: list[ExitStack | None] = [None, None]
        self._entered: list[Entered | None] = [None, None]  # by half of a batch, if there are two

    def enter(self, x: torch.Tensor) -> tuple[torch.Tensor, Overlapped | None]:
        """f: once for each tensor that several layers read."""
        if (stack := self._stacks[halves.half()]) is not None and self.random is not None:
            stack.enter_context(self._drawing(self.random))
        if not (torch.is_grad_enabled() and x.requires_grad) and not isinstance(x, LazyTensor):
            return x, None
        found = self._entered[halves.half()]
        if found is None or found.x is not x or found.version != x._version:
            found = self._entered[halves.half()] = self._enter(x)
        return found.y, found.overlapped

    @contextmanager
    def _drawing(self, random: RandomStreams) -> Iterator[None]:
        halves.keep(1)
        try:
            with random.fork(STREAM):
                yield
        finally:
            halves.keep(-1)

    def _enter(self, x: torch.Tensor) -> Entered:
        version = x._version
        if isinstance(x, LazyTensor) and isinstance(x.parts, SequenceParts):
            if not self.overlap:
                return Entered(x, version, x.parts.gather(part_of(x), x.cut), None)
            arriving = OverlappedParts(x.parts, x.cut)
            return Entered(x, version, arriving.enter(part_of(x)), arriving)
        whole: torch.Tensor = plain(x)
        overlapped = Overlapped(self.tp) if self.overlap or halves.in_halves() else None
        y = self.tp.copy(whole) if overlapped is None else overlapped.enter(whole)
        halves.entered(y)
        return Entered(x, version, y, overlapped)

    def leave(self) -> None:
        """Draw what is common to all ranks again, and forget what has come in."""
        self._entered[halves.half()] = None
        if (stack := self._stacks[halves.half()]) is not None:
            stack.close()

    @contextmanager
    def around(self) -> Iterator[None]:
        """Surround the forward of the module that has the region inside."""
        half, stack = halves.half(), ExitStack()
        outer, self._stacks[half] = self._stacks[half], stack
        try:
            with stack:
                yield
        finally:
            self._stacks[half], self._entered[half] = outer, None


class Columns(Shared):
    """What a layer whose outputs are cut needs.

    Args:
        lane: its region.
        kind: how its weight lies.
        own: how many outputs are this rank's alone; the others are gathered.
        longest: most outputs that a rank gives to those that are gathered.
        order: which of (its own, gathered) are used; ``None`` for its own.
        replicated: whether what follows is computed alike on all ranks.
    """

    def __init__(
        self,
        lane: Lane,
        kind: Kind,
        own: int,
        longest: int,
        order: torch.Tensor | None,
        *,
        replicated: bool = False,
    ) -> None:
        self.lane, self.kind, self.own = lane, kind, own
        self.longest, self.order, self.replicated = longest, order, replicated
        everything = list(range(longest * lane.tp.size))
        self._in_order = order is not None and own == 0 and order.tolist() == everything

    def output(self, y: torch.Tensor) -> torch.Tensor:
        """What the layer returns."""
        return self.joined(y)

    def joined(self, y: torch.Tensor) -> torch.Tensor:
        """Outputs that this rank goes on with."""
        if self.order is None:
            return y
        own, part = y[..., : self.own], y[..., self.own :]
        part = nn.functional.pad(part, (0, self.longest - part.shape[-1]))
        gather = self.lane.tp.gather if self.replicated else self.lane.tp.all_gather
        every = gather(part, dim=-1)
        if self._in_order:
            return every
        if self.order.device != y.device and not y.is_meta:  # where shapes alone are asked for
            self.order = self.order.to(y.device)
        return torch.cat([own, every], -1).index_select(-1, self.order.to(y.device))


class TokenColumns(Columns):
    """What a head that is cut by tokens needs: all ranks go on with all logits.

    Args:
        lane: its region.
        kind: how its weight lies.
        longest: most tokens that a rank has.
        order: of tokens, in what is gathered.
        start: this rank's first token.
        extent: tokens of the vocabulary.
        lazy: whether logits are gathered when they are read, rather than at once.
    """

    travels = False

    def __init__(
        self,
        lane: Lane,
        kind: Kind,
        longest: int,
        order: torch.Tensor,
        *,
        start: int,
        extent: int,
        lazy: bool,
    ) -> None:
        super().__init__(lane, kind, 0, longest, order, replicated=True)
        self.what = "logits (tensor_parallel.vocabulary_loss)"
        self.tp, self.start, self.extent, self.lazy = lane.tp, start, extent, lazy

    def output(self, y: torch.Tensor) -> torch.Tensor:
        """All logits. In evaluation they are gathered at once, since one rank alone may read them;
        a compiler does not trace through those that are not.
        """
        if self.lazy and y.requires_grad and not torch.compiler.is_compiling():
            return lazy(y, self)
        return self.joined(y)

    def assemble(self, part: torch.Tensor, dim: int) -> torch.Tensor:
        """All logits of parts along ``dim``. Collective."""
        return self.joined(part.movedim(dim, -1)).movedim(-1, dim)


class ColumnLayer(nn.Module):
    """Mixed in: a layer that computes some of its outputs."""

    tensor_columns: Columns
    weight: torch.Tensor
    bias: torch.Tensor | None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        columns = self.tensor_columns
        x, overlapped = columns.lane.enter(x)
        if overlapped is not None:
            return columns.output(overlapped.product(x, self.weight, self.bias, columns.kind))
        return columns.output(product(x, self.weight, self.bias, columns.kind))


class Rows(Shared):
    """What a layer whose inputs are cut needs.

    Args:
        lane: its region.
        kind: how its weight lies.
        picked: which inputs are this rank's, where all of them come in; ``None`` where only these
            do.
    """

    def __init__(self, lane: Lane, kind: Kind, picked: torch.Tensor | None) -> None:
        self.lane, self.kind, self.picked = lane, kind, picked


class RowLayer(nn.Module):
    """Mixed in: a layer that computes a term of each of its outputs, and their sum."""

    tensor_rows: Rows
    weight: torch.Tensor
    bias: torch.Tensor | None

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        rows = self.tensor_rows
        if rows.picked is not None:
            if rows.picked.device != x.device and not x.is_meta:
                rows.picked = rows.picked.to(x.device)
            x = x.index_select(-1, rows.picked.to(x.device))
        rows.lane.leave()
        terms = product(x, self.weight, None, rows.kind)
        if halves.in_halves():
            y = halves.summed_meanwhile(terms, rows.lane.tp)
        else:
            y = summed(terms, rows.lane.tp, in_parts=rows.lane.in_parts)
        return y if self.bias is None else y + self.bias


class SeededModule(nn.Module):
    """Mixed in: a module around regions, whose dropout differs between ranks in these alone."""

    tensor_lanes: tuple[Lane, ...]

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        with ExitStack() as stack:
            for lane in self.tensor_lanes if self.training else ():
                stack.enter_context(lane.around())
            return super().forward(*args, **kwargs)


class Table(Shared):
    """What an embedding of which each rank has some rows needs.

    Args:
        tp: collectives over the ranks.
        start: first row of this rank.
        stop: row after its last one.
        in_parts: whether ranks share out the sequence behind it.
    """

    def __init__(self, tp: Functional, start: int, stop: int, *, in_parts: bool = False) -> None:
        self.tp, self.start, self.stop, self.in_parts = tp, start, stop, in_parts


class TableLayer(nn.Module):
    """Mixed in: an embedding that looks up its own rows; the others' come in a sum."""

    tensor_table: Table

    def forward(self, ids: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        table = self.tensor_table
        elsewhere = (ids < table.start) | (ids >= table.stop)
        own = (ids - table.start).masked_fill(elsewhere, 0)
        y: torch.Tensor = super().forward(own, *args, **kwargs)
        terms = y.masked_fill(elsewhere.unsqueeze(-1), 0)
        return summed(terms, table.tp, in_parts=table.in_parts)


def product(
    x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, kind: Kind
) -> torch.Tensor:
    """``x`` times a matrix that may lie transposed, or as a stack of its columns."""
    if kind == "linear":
        return nn.functional.linear(x, weight, bias)
    parts = [x @ part for part in (weight.unbind() if weight.dim() > MATRIX else (weight,))]
    y = parts[0] if len(parts) == 1 else torch.cat(parts, -1)
    return y if bias is None else y + bias


@cache
def _joined(mixin: type[nn.Module], kind: type[nn.Module]) -> type[nn.Module]:
    names = {
        "__module__": kind.__module__,
        "__qualname__": kind.__qualname__,
        "__doc__": kind.__doc__,
    }
    return type(kind.__name__, (mixin, kind), names)


def take_over(module: nn.Module, mixin: type[nn.Module]) -> None:
    """Let ``module`` be a ``mixin`` as well as what it is."""
    if not isinstance(module, mixin):
        made: Any = _joined
        module.__class__ = made(mixin, type(module))
