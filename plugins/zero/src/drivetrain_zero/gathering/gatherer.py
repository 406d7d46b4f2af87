"""Units are gathered in the common order, ahead of their use where communication overlaps."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from drivetrain_zero.gathering.unit import Reason

if TYPE_CHECKING:
    from drivetrain_zero.gathering.order import CommonOrder, Walk
    from drivetrain_zero.gathering.unit import GatheredUnit


@dataclass(frozen=True)
class GatherPolicy:
    """When parameters are gathered and kept.

    Args:
        ahead: largest number of elements gathered before they are needed; 0 for none.
        live: nothing is gathered ahead beyond this number of gathered elements.
        persistent: units with at most this many elements stay gathered.
        persistent_total: largest number of elements that stay gathered.
        reuse_distance: a unit that backward needs within this many elements stays gathered after
            forward; ``None`` keeps only the last one.
        until_update: whatever is gathered stays so until its shards change.
        log_order: say when units are used in another order than learned.
    """

    ahead: int
    live: int
    persistent: int
    persistent_total: int
    reuse_distance: int | None
    until_update: bool
    log_order: bool


class Gatherer:
    """Moves units between sharded and whole; on all ranks alike, whatever each of them uses.

    Args:
        units: the root first; see :func:`find_units`.
        policy: when to gather and keep.
        order: says what comes next, and compares with other ranks.
        asynchronous: gather ahead while the device computes.
        passed: told in backward, at the same places on all ranks, which units are behind it.
    """

    def __init__(
        self,
        units: Sequence[GatheredUnit],
        policy: GatherPolicy,
        order: CommonOrder,
        *,
        asynchronous: bool,
        passed: Callable[[Sequence[int]], None],
    ) -> None:
        self.units = units
        self.order = order
        self.until_update = policy.until_update
        self._policy = policy
        self._asynchronous = asynchronous
        self._passed = passed
        self._fetches = any(bucket.whole.fetches for unit in units for bucket in unit.buckets)
        total = 0
        for unit in sorted(units, key=lambda unit: unit.numel):
            total += unit.numel
            if total <= policy.persistent_total and unit.numel <= policy.persistent:
                unit.reasons.add(Reason.PERSISTENT)

    # -- one walk -----------------------------------------------------------------------------

    def visit(self, unit: GatheredUnit, walk: Walk | None) -> None:
        """Gather a unit that is about to be used, after those that come before it.

        Args:
            unit: any.
            walk: which has come to it; ``None`` outside of the model's forward and backward.
        """
        if walk is None:
            self.gather(unit)
            return
        if Reason.HELD in unit.reasons:
            walk.visited.append(unit.number)  # it is whole, and joined when its turn comes
            return
        for number in walk.visit(unit.number):
            self._join(self.units[number], walk)
        if walk.is_lost:
            self.order.leave(unit.number)
            self.gather(unit, known=False)
        else:
            self._reach(unit, walk)
            self._finish(unit)

    def end(self, walk: Walk) -> None:
        """Take part in the gathers of all units that ``walk`` has not come to."""
        for number in walk.end():
            self._join(self.units[number], walk)

    def gather(self, unit: GatheredUnit, *, known: bool = True) -> None:
        """Make a unit whole by itself; all ranks do, and agree on it unless it is ``known``."""
        self._start(unit, asynchronous=False, known=known)
        self._finish(unit)

    def rest(self, unit: GatheredUnit) -> None:
        """End a unit's forward: keep what backward needs soon, else release it."""
        # What a forward with a graph has kept, none without takes away before backward comes.
        if torch.is_grad_enabled() and self._soon_again(unit):
            unit.reasons.add(Reason.BACKWARD)
        if Reason.BACKWARD in unit.reasons:
            unit.watch(True)
        else:
            unit.release()

    def _join(self, unit: GatheredUnit, walk: Walk) -> None:
        """Take part in the gather of a unit that other ranks may need."""
        self._reach(unit, walk)
        self._finish(unit)
        if walk.direction == "backward":
            unit.release()
        else:
            self.rest(unit)

    def _reach(self, unit: GatheredUnit, walk: Walk) -> None:
        """Do what all ranks do where a walk comes to ``unit``, whichever of them use it."""
        if walk.has_reached(unit.number):
            unit.release()  # as it is on ranks that have only joined it
        if behind := walk.behind():
            self._passed(behind)
        walk.reach(unit.number)
        self._start(unit, asynchronous=self._asynchronous)
        if self._fetches:
            self._fetch_ahead(unit, walk)
        if self._asynchronous:
            self._gather_ahead(unit, walk)

    def _start(self, unit: GatheredUnit, *, asynchronous: bool, known: bool = True) -> None:
        if unit.is_due:
            if self.until_update:
                unit.reasons.add(Reason.UPDATE)
            with self.order.gather(unit.number, known=known):
                unit.start(asynchronous=asynchronous)

    def _finish(self, unit: GatheredUnit) -> None:
        with self.order.wait(unit.number):
            unit.gather()

    def _gather_ahead(self, unit: GatheredUnit, walk: Walk) -> None:
        """Start the next units. Which ones depends on the order alone, not on what is gathered.

        So one that comes again has to wait for its turn: ranks release it at different times.
        """
        room = min(self._policy.ahead, self._policy.live - unit.numel)
        for number in walk.ahead():
            following = self.units[number]
            room -= following.numel
            if room < 0:
                return
            if not walk.has_reached(number):
                self._start(following, asynchronous=True)

    def _fetch_ahead(self, unit: GatheredUnit, walk: Walk) -> None:
        """Bring near what is gathered after the next units; a matter of this rank alone."""
        room = min(2 * self._policy.ahead, self._policy.live - unit.numel)
        for place, number in enumerate(walk.ahead() if self._policy.ahead else ()):
            following = self.units[number]
            room -= following.numel
            if room < 0 and place:  # the very next one is as good as in use
                return
            following.fetch_ahead()

    def _soon_again(self, unit: GatheredUnit) -> bool:
        if unit.number == 0:
            return True
        back = self.order.forward[::-1]
        between = back[: back.index(unit.number)]
        if self._policy.reuse_distance is None:
            return not between
        distance = sum(self.units[number].numel for number in between)
        return 2 * distance + unit.numel <= self._policy.reuse_distance

    # -- between walks ------------------------------------------------------------------------

    def gather_persistent(self) -> None:
        """Make the units whole that stay so. Collective."""
        for unit in self.units:
            if Reason.PERSISTENT in unit.reasons:
                unit.gather()

    def release_all(self) -> None:
        """Keep only shards, but of what is persistent or pinned."""
        for unit in self.units:
            unit.let_go(Reason.UPDATE, Reason.HELD)

    def begin_anew(self) -> None:
        """Show new values, and gather what the next forward uses first. Collective."""
        for unit in self.units:
            unit.renew()
        if self.until_update and self._asynchronous:
            self._reach(self.units[self.order.forward[0]], self.order.walk("forward"))
