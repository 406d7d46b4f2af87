"""In which order the units of a model are gathered: pure logic.

Gathering is collective, so all ranks have to gather the same units in the same order, whatever
their data makes them skip. [Note: one order] So there is one order for a pass forward, and its
reverse for a pass backward. A rank that needs a unit first *joins* the gathers of those it has
skipped, and at the end of a pass those of all that are left; a joined unit is released at once.
The order starts as the module's and is learned again, together, at a step boundary after any
rank has left it.
"""

from __future__ import annotations

from collections.abc import Sequence


class Pass:
    """One walk through the units, forward or backward.

    Args:
        order: the units that all ranks gather, by number; one may come repeatedly.
    """

    def __init__(self, order: Sequence[int]) -> None:
        self._order = order
        self._at = 0
        self.visited: list[int] = []
        self.reached: list[int] = []
        """Units of the order that all ranks have come to by now, used or joined."""
        self.left_order = False
        self.is_lost = False
        """Whether the latest visit is one that the order does not have."""

    def visit(self, unit: int) -> Sequence[int]:
        """Note that ``unit`` is about to be used.

        Returns:
            The units to join first; each of them, and then ``unit``, is a :meth:`step`. A unit
            that does not come any more in the order joins nothing, and is no step; all ranks have
            to agree on its use by themselves.
        """
        self.visited.append(unit)
        try:
            place = self._order.index(unit, self._at)
        except ValueError:
            self.left_order = self.is_lost = True
            return ()
        self.is_lost = False
        return self._order[self._at : place]

    def step(self) -> None:
        """Come to the next unit of the order, used or joined."""
        self._at += 1

    def ahead(self) -> Sequence[int]:
        """What comes next, in order."""
        return self._order[self._at :]

    def end(self) -> Sequence[int]:
        """The units to join at the end of the pass; each is a :meth:`step`."""
        return self._order[self._at :]


def learned(visited: Sequence[int], count: int) -> list[int]:
    """The order after a pass that left the known one: as visited, then the units that were not."""
    return [*visited, *(unit for unit in range(count) if unit not in set(visited))]
