"""Which buckets' parameters are near their states, by the order in which updates come."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Protocol

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


class UpdateOrder:
    """Reads buckets ahead of their updates and lets updated ones go once they are written.

    The order is that of the last step. The first ones are read before that step's updates begin,
    as soon as gradients arrive. Homes of one job share it.

    Args:
        nbytes: memory near the states that buckets may take together, if it is enough for one.
    """

    def __init__(self, nbytes: int) -> None:
        self._nbytes = nbytes
        self._last: list[Visitor] = []  # all of the last step
        self._now: list[Visitor] = []  # those of this one so far
        self._ahead: list[Visitor] = []  # with memory, not updated yet
        self._in_use: Visitor | None = None
        self._writing: deque[Visitor] = deque()  # with memory, updated

    def expect(self) -> None:
        """Gradients arrive, so updates will come."""
        if self._now:
            self._begin_round()
        self._read_ahead()

    def begin(self, visitor: Visitor) -> None:
        """``visitor`` is updated now."""
        if visitor in self._now:
            self._begin_round()
        self._now.append(visitor)
        if visitor in self._ahead:
            self._ahead.remove(visitor)
        else:
            self._make_room(visitor)
        self._in_use = visitor
        self._read_ahead()

    def end(self, visitor: Visitor) -> None:
        """``visitor`` has been updated and is being written."""
        self._in_use = None
        self._writing.append(visitor)
        self._read_ahead()

    def left(self, visitor: Visitor) -> None:
        """``visitor`` has no memory any more."""
        for group in (self._ahead, self._writing):
            if visitor in group:
                group.remove(visitor)

    def _begin_round(self) -> None:
        self._last, self._now = self._now, []

    def _make_room(self, visitor: Visitor) -> None:
        """Have memory for one that nobody has read ahead."""
        if visitor in self._writing:
            visitor.leave()
        while not self._fits(visitor) and (self._writing or self._ahead):
            (self._writing[0] if self._writing else self._ahead[-1]).leave()

    def _read_ahead(self) -> None:
        """Begin to read what is updated next, if all goes as in the last step."""
        latest = self._now[-1] if self._now else None
        start = self._last.index(latest) + 1 if latest in self._last else 0
        for following in self._last[start:]:
            if following in (*self._now, *self._ahead) or not following.begins_with_reading:
                continue
            if following in self._writing:  # in the last step: all that it needs is here
                self._writing.remove(following)
                self._ahead.append(following)
                continue
            while not self._fits(following) and self._writing and self._writing[0].is_written():
                self._writing[0].leave()
            if not self._fits(following):
                return
            following.begin_to_bring_near()
            self._ahead.append(following)

    def _fits(self, visitor: Visitor) -> bool:
        """Whether there is room for one more."""
        taken = [*self._ahead, *self._writing, *([self._in_use] if self._in_use else [])]
        return sum(other.nbytes for other in taken) + visitor.nbytes <= self._nbytes
