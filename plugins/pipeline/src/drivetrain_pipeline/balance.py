"""Cutting a list of layers into consecutive parts so that the slowest part takes the least time."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate

from drivetrain.errors import DrivetrainError


@dataclass(frozen=True)
class Layer:
    """What one layer costs, in any units that are the same for all.

    Args:
        time: of one micro-batch's forward and backward. With 1 for each layer parts have equal
            numbers of layers, with numbers of parameters equal sizes, and with 1 for some and 0 for
            others equal numbers of those.
        activations: memory that one micro-batch keeps for backward.
        fixed: memory of its parameters, gradients and optimizer states.
    """

    time: float
    activations: float = 0.0
    fixed: float = 0.0


class BalanceError(DrivetrainError):
    """Layers that cannot be cut into the parts that are asked for."""


def balance(
    layers: Sequence[Layer],
    parts: int,
    *,
    limit: float | None = None,
    held: Sequence[int] | None = None,
) -> tuple[int, ...]:
    """Cut layers into parts of at least one layer each.

    The slowest part takes the least time that any cut allows. Of the cuts with that time, this one
    has parts as equal as can be: the least sum of squared times, then of squared numbers of layers.

    The least time is found by bisection over times of parts, of which each step finds one that is
    reached exactly; so the result is that of an exhaustive search.

    Args:
        layers: in the order of the model.
        parts: how many.
        limit: memory that a part may have; None for no limit.
        held: by part, the micro-batches whose activations it keeps at a time; None for 1 each.

    Returns:
        ``parts + 1`` positions: part ``i`` has the layers from ``bounds[i]`` to ``bounds[i + 1]``.

    Raises:
        BalanceError: there are fewer layers than parts, or no cut keeps the limit.
    """
    if parts < 1:
        raise BalanceError(f"{parts} parts of a model: there must be at least 1")
    if len(layers) < parts:
        raise BalanceError(f"{len(layers)} layers cannot be cut into {parts} parts")
    if any(not 0 <= x.time < float("inf") for x in layers):
        raise BalanceError("the time of a layer is negative or not finite")
    if held is not None and len(held) != parts:
        raise ValueError(f"held of {len(held)} parts, but {parts} parts")
    search = _Search(layers, parts, limit, held or (1,) * parts)
    return search.most_even(search.least())


_Found = tuple[float, int, tuple[int, ...]]
"""Sum of squared times, of squared numbers of layers, and the bounds of the parts so far."""


class _Search:
    """The cuts of one list of layers.

    Args:
        layers, parts, limit, held: as in :func:`balance`.
    """

    def __init__(
        self, layers: Sequence[Layer], parts: int, limit: float | None, held: Sequence[int]
    ) -> None:
        self._count, self._parts = len(layers), parts
        self._times = list(accumulate((x.time for x in layers), initial=0.0))
        self._layers, self._limit, self._held = layers, limit, held
        self._memory = {
            h: list(accumulate((x.fixed + h * x.activations for x in layers), initial=0.0))
            for h in set(held)
        }

    def least(self) -> float:
        """The least time of the slowest part.

        Raises:
            BalanceError: no cut keeps the memory limit.
        """
        # Parts of this much time are always enough where no memory limit is in the way.
        low = max(self._times[-1] / self._parts, max(x.time for x in self._layers))
        high, _ = self._probe(2 * low)
        if high is None:
            high, _ = self._probe(float("inf"))
        if high is None:
            raise BalanceError(self._too_much())
        while low < high:
            middle = (low + high) / 2
            reached, more = self._probe(middle if middle < high else low)
            if reached is not None:
                high = reached
            else:
                low = more
        return high

    def _probe(self, time: float) -> tuple[float | None, float]:
        """Try parts of at most ``time``.

        Returns:
            The time of the slowest part of a cut, or None if there is none; and the least time
            beyond ``time`` at which a part could have had another layer.
        """
        # By the position where a part ends: the slowest part up to there, for the best cut so far.
        slowest: dict[int, float] = {0: 0.0}
        more = float("inf")
        for part in range(self._parts):
            ends: dict[int, float] = {}
            last = self._count - (self._parts - 1 - part)
            for first, before in slowest.items():
                end = self._end(part, first, last)
                fits = min(end, bisect_right(self._times, self._times[first] + time) - 1)
                while fits > first and self._time(first, fits) > time:
                    fits -= 1  # rounding let this one in
                while fits < end and self._time(first, fits + 1) <= time:
                    fits += 1  # rounding kept this one out
                if fits < end:
                    more = min(more, self._time(first, fits + 1))
                for at in range(first + 1, fits + 1):
                    reached = max(before, self._time(first, at))
                    if reached < ends.get(at, float("inf")):
                        ends[at] = reached
            slowest = ends
        return slowest.get(self._count), more

    def _time(self, first: int, end: int) -> float:
        return self._times[end] - self._times[first]

    def _end(self, part: int, first: int, last: int) -> int:
        """The furthest position at which a part from ``first`` keeps the memory limit."""
        if self._limit is None:
            return last
        memory = self._memory[self._held[part]]
        return min(last, bisect_right(memory, memory[first] + self._limit) - 1)

    def most_even(self, time: float) -> tuple[int, ...]:
        """The bounds of the most equal parts of at most ``time``."""
        best: dict[int, _Found] = {0: (0.0, 0, (0,))}
        for part in range(self._parts):
            ends: dict[int, _Found] = {}
            last = self._count - (self._parts - 1 - part)
            for first, (squares, numbers, bounds) in best.items():
                for at in range(first + 1, self._end(part, first, last) + 1):
                    own = self._time(first, at)
                    if own > time:
                        break
                    found = (squares + own**2, numbers + (at - first) ** 2, (*bounds, at))
                    if at not in ends or found[:2] < ends[at][:2]:
                        ends[at] = found
            best = ends
        return best[self._count][2]

    def _too_much(self) -> str:
        held, limit = min(self._held), self._limit
        largest = max(
            range(self._count),
            key=lambda i: self._layers[i].fixed + held * self._layers[i].activations,
        )
        layer = self._layers[largest]
        needed = layer.fixed + held * layer.activations
        return (
            f"no cut of {self._count} layers into {self._parts} parts keeps each within {limit:g} "
            f"of memory; layer {largest} alone needs {needed:g}; use more stages, a schedule that "
            "keeps fewer micro-batches, or recomputation"
        )
