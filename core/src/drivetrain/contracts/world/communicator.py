"""Collectives by mesh axis: the interface that every part of a job communicates through.

Whoever communicates calls a method of :class:`Communicator`; each makes a :class:`Collective` of
its arguments and passes it to :meth:`Communicator.run`. Decorators (byte log, shared memory,
compression, watchdog) override that one method around another communicator, and may run other
collectives instead of the one they are given, so nothing else needs to know that they are there.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import IntEnum
from typing import TYPE_CHECKING, Protocol

from drivetrain.contracts.world.collective import Collective, Kind, Op, Tag

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts.world.axis import Axis


class Handle(Protocol):
    """A collective under way."""

    def wait(self) -> None:
        """Block until the result is usable on the current stream.

        Raises:
            CommunicationError: the collective failed; names the tag and, if known, the rank.
        """


class _Done:
    def wait(self) -> None:
        pass


DONE: Handle = _Done()
"""The handle of every collective that is finished."""


class Communicator(ABC):
    """Collectives over named axes of the job's mesh.

    ``axis`` is an axis name, a tuple of names (their product), or an ``Axis`` that
    ``mesh.subgroup`` returned. Over an axis of size 1 a collective is a copy (or nothing).
    With ``asynchronous=True`` a method returns at once, and the tensors must not be touched before
    ``handle.wait()``; otherwise the handle is already finished. All ranks of the axis must issue
    the same collectives in the same order.
    """

    @abstractmethod
    def size(self, axis: Axis) -> int:
        """Number of ranks along ``axis``."""

    @abstractmethod
    def rank(self, axis: Axis) -> int:
        """This rank's position along ``axis``."""

    @abstractmethod
    def run(self, collective: Collective) -> Handle:
        """Run any collective; the methods below all come here.

        Raises:
            CommunicationError: it does not fit together (:meth:`Collective.flaw`), or it broke.
        """

    @abstractmethod
    def buffer(self, numel: int, dtype: torch.dtype, axis: Axis) -> torch.Tensor:
        """Flat zeroed memory on the job's device in which ``axis`` communicates fastest."""

    def reads_settled(self, input: torch.Tensor, axis: Axis) -> bool:
        """Whether a settled all-gather of ``input`` needs no other rank to take part.

        Then ranks may gather at different times, or not at all.
        """
        return False

    def joined_page(self, axis: Axis) -> int:
        """Bytes that each rank's part of a :meth:`joined_buffer` must be a multiple of.

        0 where the ranks of ``axis`` share no memory.
        """
        return 0

    def joined_buffer(self, numel: int, dtype: torch.dtype, axis: Axis) -> torch.Tensor | None:
        """Zeroed memory of all ranks as one flat tensor [numel * size] that each reads in place.

        Slice ``rank`` is this rank's, and it alone writes there. ``None``, on every rank, where
        they cannot share that memory. Collective.
        """
        return None

    def all_reduce(
        self,
        tensor: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        op: Op = Op.SUM,
        asynchronous: bool = False,
    ) -> Handle:
        """Reduce ``tensor`` over ``axis``, in place, on every rank."""
        return self.run(Collective(Kind.ALL_REDUCE, (tensor,), axis, tag, op, asynchronous))

    def reduce_scatter(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        op: Op = Op.SUM,
        asynchronous: bool = False,
    ) -> Handle:
        """Reduce flat ``input`` [n * size] and keep slice ``rank`` of it in ``output`` [n].

        ``output`` may be that slice of ``input``.
        """
        tensors = (output, input)
        return self.run(Collective(Kind.REDUCE_SCATTER, tensors, axis, tag, op, asynchronous))

    def all_gather(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        asynchronous: bool = False,
        settled: bool = False,
    ) -> Handle:
        """Concatenate every rank's flat ``input`` [n] into ``output`` [n * size].

        ``input`` may be slice ``rank`` of ``output``. With ``settled``, see :class:`Collective`.
        """
        return self.run(
            Collective(
                Kind.ALL_GATHER,
                (output, input),
                axis,
                tag,
                asynchronous=asynchronous,
                settled=settled,
            )
        )

    def broadcast(
        self,
        tensor: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        source: int = 0,
        asynchronous: bool = False,
    ) -> Handle:
        """Copy ``tensor`` of the rank at position ``source`` of ``axis`` to all others."""
        return self.run(
            Collective(Kind.BROADCAST, (tensor,), axis, tag, Op.SUM, asynchronous, source)
        )

    def all_to_all(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        asynchronous: bool = False,
    ) -> Handle:
        """Send slice i of dimension 0 of ``input`` to position i; receive likewise into ``output``.

        Without splits both are cut evenly; with them, ``splits[i]`` rows go to / come from i.
        """
        return self.run(
            Collective(
                Kind.ALL_TO_ALL,
                (output, input),
                axis,
                tag,
                asynchronous=asynchronous,
                output_splits=output_splits,
                input_splits=input_splits,
            )
        )

    def send_receive(
        self,
        sends: Sequence[tuple[torch.Tensor, int]],
        receives: Sequence[tuple[torch.Tensor, int]],
        axis: Axis,
        tag: Tag,
        *,
        asynchronous: bool = False,
    ) -> Handle:
        """Send and receive several tensors as one, so that no order of them can hang.

        Each comes with the position of ``axis`` that it goes to or comes from. Only ranks that have
        messages call it. Messages from one rank to another arrive in the order in which they are
        issued, with the shape and dtype that they are sent with; ranks may put them into calls in
        different ways. The first collective of an axis, whichever it is, is one that all its ranks
        take part in, since NCCL connects them there.
        """
        tensors, peers = zip(*sends, *receives, strict=True) if sends or receives else ((), ())
        if not tensors:
            return DONE
        return self.run(
            Collective(
                Kind.SEND_RECEIVE,
                tensors,
                axis,
                tag,
                asynchronous=asynchronous,
                peers=peers,
                sends=len(sends),
            )
        )

    def send(
        self, tensor: torch.Tensor, axis: Axis, tag: Tag, *, to: int, asynchronous: bool = False
    ) -> Handle:
        """Send ``tensor`` to position ``to`` of ``axis``; see :meth:`send_receive`."""
        return self.send_receive([(tensor, to)], (), axis, tag, asynchronous=asynchronous)

    def receive(
        self, tensor: torch.Tensor, axis: Axis, tag: Tag, *, source: int, asynchronous: bool = False
    ) -> Handle:
        """Receive into ``tensor`` from position ``source``; see :meth:`send_receive`."""
        return self.send_receive((), [(tensor, source)], axis, tag, asynchronous=asynchronous)

    def barrier(self, axis: Axis, tag: Tag) -> None:
        """Wait until every rank of ``axis`` is here."""
        self.run(Collective(Kind.BARRIER, (), axis, tag))


class CommunicatorWrapper(Communicator):
    """The base of decorators: hands everything on to ``inner``; override :meth:`run`.

    Args:
        inner: the communicator to decorate.
    """

    def __init__(self, inner: Communicator) -> None:
        self.inner = inner

    def size(self, axis: Axis) -> int:
        return self.inner.size(axis)

    def rank(self, axis: Axis) -> int:
        return self.inner.rank(axis)

    def run(self, collective: Collective) -> Handle:
        return self.inner.run(collective)

    def buffer(self, numel: int, dtype: torch.dtype, axis: Axis) -> torch.Tensor:
        return self.inner.buffer(numel, dtype, axis)

    def reads_settled(self, input: torch.Tensor, axis: Axis) -> bool:
        return self.inner.reads_settled(input, axis)

    def joined_page(self, axis: Axis) -> int:
        return self.inner.joined_page(axis)

    def joined_buffer(self, numel: int, dtype: torch.dtype, axis: Axis) -> torch.Tensor | None:
        return self.inner.joined_buffer(numel, dtype, axis)


class CommunicatorPhase(IntEnum):
    """Where a decorator sits, from the inside out.

    Routes carry data by ways of their own, so they are inside the byte log (core's), which counts
    what travels whichever way it goes, after compression. A route that configs may choose says in
    its attribute ``route`` what they call it.
    """

    ROUTE = 0
    BYTE_LOG = 1
    COMPRESS = 2
    WATCHDOG = 3
    USER_LOG = 4


@dataclass(frozen=True)
class CommunicatorLayer:
    """A decorator offered by the ``wrap_communicator`` hook.

    Args:
        phase: its place in the fold.
        wrap: takes the communicator so far and returns the decorated one.
    """

    phase: CommunicatorPhase
    wrap: Callable[[Communicator], Communicator]


def is_first_copy(communicator: Communicator, *axes: Axis) -> bool:
    """True if this rank's copy is the first of those along ``axes``: it counts, and is saved."""
    return all(communicator.rank(axis) == 0 for axis in axes)
