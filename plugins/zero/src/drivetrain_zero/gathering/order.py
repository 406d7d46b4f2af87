"""The common order: which unit all ranks gather next; ranks learn and compare it together.

Gathering is collective, so all ranks have to gather the same units in the same order, whatever
their data makes them skip. [Note: one order] So there is one order for a walk forward, and its
reverse for a walk backward. A rank that needs a unit first *joins* the gathers of those it has
skipped, and at the end of a walk those of all that are left; a joined unit is released at once.
The order starts as the module's and is learned again, together, at a step boundary after any
rank has left it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING, Literal

import torch

from drivetrain.contracts import Axis, Communicator, Op, Purpose, Tag, axis_name
from drivetrain.errors import TrainingError

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_zero.gathering.out_of_order import Agreement

Direction = Literal["forward", "backward"]

_DIGEST_PRIME = 16_777_213
"""Below 2^24, so that a digest is a whole number in float32."""

logger = logging.getLogger("drivetrain.zero")


class Walk:
    """One rank's way through the units, forward or backward.

    Args:
        order: the units that all ranks gather, by number; one may come repeatedly.
        direction: of the pass through the model.
        alone: this rank gathers by itself, so it joins nothing.
        reduces: gradients are reduced of what all ranks have left behind.
    """

    def __init__(
        self,
        order: Sequence[int],
        direction: Direction = "forward",
        *,
        alone: bool = False,
        reduces: bool = False,
    ) -> None:
        self.direction = direction
        self._order = order
        self._alone = alone
        self._reduces = reduces
        self._at = 0
        self._reached: list[int] = []
        self.visited: list[int] = []
        """Units that this rank has used."""
        self.is_lost = False
        """True if the latest visit is one that the order does not have."""

    def visit(self, unit: int) -> Sequence[int]:
        """Note that ``unit`` is about to be used.

        Returns:
            The units to join first; each of them, and then ``unit``, is to be reached. A unit
            that does not come any more in the order joins nothing, and is not reached; all ranks
            have to agree on its use by themselves.
        """
        self.visited.append(unit)
        coming = self.ahead()
        self.is_lost = unit not in coming
        if self.is_lost:
            return ()
        skipped = coming[: coming.index(unit)]
        if not self._alone:
            return skipped
        self._at += len(skipped)
        return ()

    def reach(self, unit: int) -> None:
        """Come to the next unit of the order, used or joined."""
        self._at += 1
        if not self._alone:
            self._reached.append(unit)

    def ahead(self) -> Sequence[int]:
        """Return what comes next, in order."""
        return self._order[self._at :]

    def end(self) -> Sequence[int]:
        """Return the units to join at the end of the walk; each is to be reached."""
        return () if self._alone else self.ahead()

    def has_reached(self, unit: int) -> bool:
        """Return True if all ranks have come to ``unit`` by now."""
        return unit in self._reached

    def expects(self, unit: int) -> bool:
        """Return True if all ranks are still to come to ``unit``."""
        return not self._alone and unit not in self._reached

    def behind(self) -> Sequence[int]:
        """Return the unit that all ranks leave behind now, if its gradients are to be reduced."""
        return self._reached[-1:] if self._reduces else ()


class CommonOrder:
    """What all ranks gather, in which order.

    Args:
        names: of the units, by number.
        communicator: carries what ranks learn from each other at the end of a step.
        agreement: keeps gathers of different units apart; ``None`` where a rank reads the others'
            shards where they lie, so that none has to take part in the gathers of another.
        logs: say when units are used in another order than learned.
    """

    def __init__(
        self,
        names: Sequence[str],
        communicator: Communicator,
        agreement: Agreement | None,
        *,
        logs: bool = False,
    ) -> None:
        self.alone = agreement is None
        self.wider_axes: Sequence[Axis] = ()
        """Axes of units whose shards more ranks have than those along ``data``."""
        numbers = list(range(len(names)))
        self._orders: dict[Direction, list[int]] = {"forward": numbers, "backward": numbers[::-1]}
        self._visited: dict[Direction, list[int]] = {}
        self._names = names
        self._communicator = communicator
        self._agreement = agreement
        self._logs = logs
        self._is_left = False
        self._digest = 0  # of the gathers since the last step; equal on all ranks

    @property
    def forward(self) -> Sequence[int]:
        """Units in the order of a walk forward."""
        return self._orders["forward"]

    def walk(self, direction: Direction, *, reduces: bool = False) -> Walk:
        """Begin to walk through the units."""
        return Walk(self._orders[direction], direction, alone=self.alone, reduces=reduces)

    def note(self, walk: Walk) -> None:
        """Learn from ``walk``, which has ended, if the order is to be learned again."""
        self._visited[walk.direction] = walk.visited

    def leave(self, unit: int) -> None:
        """Note that this rank needs ``unit`` out of the order, which is learned again."""
        if self._logs and not self._is_left:
            name = self._names[unit] or "root"
            logger.warning("unit %r is used in another order than before", name)
        self._is_left = True

    def gather(self, unit: int, *, known: bool) -> AbstractContextManager[object]:
        """Begin to gather ``unit`` in the block.

        Args:
            unit: its number.
            known: the order has it; otherwise the block begins once all ranks need the same.

        Raises:
            TrainingError: another rank needs another unit.
        """
        self._digest = (self._digest * 31 + unit + 1) % _DIGEST_PRIME
        if self._agreement is None:
            return nullcontext()
        self._agreement.begin(unit, self._names[unit], known=known)
        return self.wait(unit)

    def wait(self, unit: int) -> AbstractContextManager[object]:
        """Wait in the block for the latest gather of ``unit``."""
        if self._agreement is None:
            return nullcontext()
        return self._agreement.waits(unit, self._names[unit])

    def settle(self) -> None:
        """End a step: compare what ranks have gathered, and learn the order if any has left it.

        Collective. This is also where ranks wait for each other's updates before they gather.

        Raises:
            TrainingError: ranks gathered units in different orders.
        """
        for axis in self.wider_axes:
            self._communicator.barrier(axis, Tag(Purpose.CONTROL, site="updates"))
        tag = Tag(Purpose.CONTROL, site="order of units")
        digest, self._digest = 0 if self.alone else self._digest, 0
        votes = torch.tensor([digest, -digest, self._is_left], dtype=torch.float32)
        self._communicator.all_reduce(votes, "data", tag, op=Op.MAX)
        if votes[0] != -votes[1]:
            raise TrainingError(
                "ranks gathered the units of the model in different orders in this step, so their "
                "weights may have been mixed up: see 'ranks that walk differently' in the README "
                "of drivetrain-zero"
            )
        if votes[2]:
            self._is_left = False
            self._orders = {way: self._learn(way) for way in self._orders}

    def _learn(self, direction: Direction) -> list[int]:
        """Return the order of the first rank's latest walk. Collective."""
        # A rank may have walked nowhere, since all was whole.
        visited, order = self._visited.get(direction), self._orders[direction]
        order = order if visited is None else learned(visited, len(self._names))
        tag = Tag(Purpose.CONTROL, site="order of units")
        length = torch.tensor([len(order)])
        self._communicator.broadcast(length, "data", tag)
        numbers = torch.zeros(int(length), dtype=torch.int64)
        known = torch.tensor(order[: int(length)], dtype=torch.int64)
        numbers[: known.numel()] = known
        self._communicator.broadcast(numbers, "data", tag)
        return [int(number) for number in numbers]

    def close(self) -> None:
        """Stop watching other ranks."""
        if self._agreement is not None:
            self._agreement.close()


def learned(visited: Sequence[int], count: int) -> list[int]:
    """The order after a walk that left the known one: as visited, then the units that were not."""
    return [*visited, *(unit for unit in range(count) if unit not in set(visited))]


def wider_axes(job: Job, axes: Iterable[Axis]) -> list[Axis]:
    """Those of ``axes`` that have ranks beside this one's along ``data``."""
    data, rank = set(job.mesh.ranks("data")), job.rank
    wider = {axis for axis in axes if not data.issuperset(job.mesh.layout.group(rank, axis))}
    return sorted(wider, key=axis_name)
