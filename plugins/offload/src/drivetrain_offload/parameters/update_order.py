"""Bring parameters near their states, in the order in which buckets are updated.

*Near* is memory from which the home of the states can update them: host memory, or the device.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Protocol
from weakref import WeakKeyDictionary, ref

TRAVELLING = "shards on their way, at most"
"""What tables of memory call what is near its states only for a while."""


def room_for(sizes: Sequence[int], count: int) -> int:
    """Bytes of ``count`` times the largest of these sizes, or of all of them if that is less."""
    return min(count * max(sizes, default=0), sum(sizes))


class Visitor(Protocol):
    """A bucket whose parameters are near its states for an update only."""

    @property
    def nbytes(self) -> int:
        """The memory that it takes there."""

    @property
    def begins_with_reading(self) -> bool:
        """Whether an update needs the parameters as they were."""

    def begin_to_bring_near(self) -> None:
        """Take memory and begin to read."""

    def leave(self) -> None:
        """Give the memory back, once nothing is moving there; tells the order."""

    def is_written(self) -> bool:
        """Whether :meth:`leave` would return at once after an update."""


Group = WeakKeyDictionary[Visitor, int]
"""Buckets in the order in which they came in."""


class UpdateOrder:
    """Reads buckets ahead of their updates and lets updated ones go when their room is needed.

    The order is that of the last step. The first ones are read before that step's updates begin,
    as soon as gradients arrive. Homes of one job share it and keep it alive, not the other way.

    Args:
        nbytes: memory near the states that buckets may take together, if it is enough for one.
    """

    def __init__(self, nbytes: int) -> None:
        self.nbytes = nbytes
        self._last: list[ref[Visitor]] = []  # those of the last step that were read
        self._places: Group = WeakKeyDictionary()  # there
        self._now: Group = WeakKeyDictionary()  # those of this one so far
        self._ahead: Group = WeakKeyDictionary()  # with memory, not updated yet
        self._writing: Group = WeakKeyDictionary()  # with memory, updated
        self._in_use: Visitor | None = None
        self._next = 0  # in the last step: the place behind the latest

    def expect(self) -> None:
        """Gradients arrive, so updates will come."""
        if self._now:
            self._begin_round()
        self._read_ahead()

    def begin(self, visitor: Visitor) -> None:
        """``visitor`` is updated now."""
        if visitor in self._now:
            self._begin_round()
        if visitor in self._ahead:
            del self._ahead[visitor]
        else:
            self._make_room(visitor)
        self._now[visitor] = len(self._now)
        self._next = self._places.get(visitor, -1) + 1
        self._in_use = visitor
        self._read_ahead()

    def end(self, visitor: Visitor) -> None:
        """``visitor`` has been updated and is being written."""
        self._in_use = None
        self._writing[visitor] = 0
        self._read_ahead()

    def left(self, visitor: Visitor) -> None:
        """``visitor`` has no memory any more."""
        self._ahead.pop(visitor, None)
        self._writing.pop(visitor, None)

    def _begin_round(self) -> None:
        reading = [visitor for visitor in self._now if visitor.begins_with_reading]
        self._last = [ref(visitor) for visitor in reading]
        self._places = WeakKeyDictionary(zip(reading, range(len(reading)), strict=True))
        self._now, self._next = WeakKeyDictionary(), 0

    def _make_room(self, visitor: Visitor) -> None:
        """Have memory for one that was not read ahead."""
        if visitor in self._writing:
            visitor.leave()
        while not self._fits(visitor) and (self._writing or self._ahead):
            (_first(self._writing) or [*self._ahead][-1]).leave()

    def _read_ahead(self) -> None:
        """Begin to read what is updated next, if all goes as in the last step."""
        for following in self._coming():
            if following in self._writing:  # in the last step: all that it needs is here
                del self._writing[following]
                self._ahead[following] = 0
                continue
            oldest = _first(self._writing)
            while not self._fits(following) and oldest is not None and oldest.is_written():
                oldest.leave()
                oldest = _first(self._writing)
            if not self._fits(following):
                return
            following.begin_to_bring_near()
            self._ahead[following] = 0

    def _coming(self) -> Iterator[Visitor]:
        """Yield the buckets that are to be read, in the order in which they are updated."""
        for at in islice(self._last, self._next, None):
            visitor = at()
            if not (visitor is None or visitor in self._now or visitor in self._ahead):
                yield visitor

    def _fits(self, visitor: Visitor) -> bool:
        """Whether there is room for one more."""
        taken = sum(other.nbytes for group in (self._ahead, self._writing) for other in group)
        in_use = 0 if self._in_use is None else self._in_use.nbytes
        return taken + in_use + visitor.nbytes <= self.nbytes


def _first(group: Group) -> Visitor | None:
    return next(iter(group), None)
