"""Which update of 0/1 Adam refreshes the second moment, and which synchronises the ranks."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Policies:
    """The policies T_v and T_u of 0/1 Adam (arXiv:2202.06009, section 6), by number of the update.

    Nothing is counted as it happens, so a run that goes on from a checkpoint needs no count.

    Args:
        freeze: updates of the first phase, in which the second moment is refreshed now and then.
        refreshes_a_distance: refreshes after which their distance doubles; it begins with 1.
        updates_a_distance: updates of the second phase after which the distance of
            synchronisations doubles; it begins with 1.
        furthest: the largest distance of synchronisations.
    """

    freeze: int
    refreshes_a_distance: int
    updates_a_distance: int
    furthest: int

    def refreshes(self, step: int) -> bool:
        """Whether update ``step`` (from 1) refreshes the second moment."""
        return step <= self.freeze and step % self.refresh_distance(step) == 0

    def refresh_distance(self, step: int) -> int:
        """The distance of refreshes that update ``step`` of the first phase has reached."""
        distance, last = 1, self.refreshes_a_distance
        while step > last:
            distance *= 2
            last = last // distance * distance + self.refreshes_a_distance * distance
        return distance

    def is_local(self, step: int) -> bool:
        """Whether update ``step`` is one of the second phase."""
        return step > self.freeze

    def begins_local(self, step: int) -> bool:
        """Whether the second phase begins with update ``step``."""
        return step == self.freeze + 1

    def synchronises(self, step: int) -> bool:
        """Whether update ``step`` of the second phase ends with a synchronisation."""
        doublings = (step - self.freeze - 1) // self.updates_a_distance
        distance = min(1 << min(doublings, 62), self.furthest)
        return step % distance == 0
