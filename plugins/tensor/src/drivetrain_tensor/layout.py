"""Which features of a layer each rank has: arithmetic on intervals, without torch."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import prod

from drivetrain.contracts.state.fragment import Box

Runs = tuple[tuple[int, int], ...]
"""Intervals [start, stop) of features, in the order in which a rank keeps them."""


def runs(features: Iterable[int]) -> Runs:
    """Intervals that make up ``features``, in their order."""
    found: list[list[int]] = []
    for feature in features:
        if found and found[-1][1] == feature:
            found[-1][1] += 1
        else:
            found.append([feature, feature + 1])
    return tuple((start, stop) for start, stop in found)


def length(intervals: Runs) -> int:
    """Number of features."""
    return sum(stop - start for start, stop in intervals)


def shares(extent: int, ranks: int) -> list[tuple[int, int]]:
    """Cut [0, extent) for ``ranks`` ranks; the first ones have what does not divide."""
    size, more = divmod(extent, ranks)
    bounds = [rank * size + min(rank, more) for rank in range(ranks + 1)]
    return list(pairwise(bounds))


@dataclass(frozen=True)
class Part:
    """What a rank keeps of a tensor that is cut along one dimension.

    Where intervals along an inner dimension have one length, the part has them one after another
    along a new first dimension, so that each is one box.

    Args:
        whole: shape of the client's tensor.
        dim: that is cut.
        intervals: along ``dim``.
    """

    whole: tuple[int, ...]
    dim: int
    intervals: Runs

    @property
    def stacked(self) -> bool:
        """Whether intervals lie along a new first dimension."""
        sizes = {stop - start for start, stop in self.intervals}
        return self.dim > 0 and len(self.intervals) > 1 and len(sizes) == 1

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        if self.stacked:
            return (len(self.intervals), *self._extent(self.intervals[0]))
        shape = list(self.whole)
        shape[self.dim] = length(self.intervals)
        return tuple(shape)

    @property
    def boxes(self) -> tuple[Box, ...]:
        """Rectangles of the whole, in the order in which the part's memory has them."""
        if self.dim == 0 or self.stacked or len(self.intervals) == 1:
            return self._one_box_each()
        outer = prod(self.whole[: self.dim])
        inner = prod(self.whole[self.dim + 1 :])
        found, local = [], 0
        for row in range(outer):
            place = _position(row, self.whole[: self.dim])
            for start, stop in self.intervals:
                rest = self.whole[self.dim + 1 :]
                size = (*(1 for _ in place), stop - start, *rest)
                found.append(Box((*place, start, *(0 for _ in rest)), size, local))
                local += (stop - start) * inner
        return tuple(found)

    def _one_box_each(self) -> tuple[Box, ...]:
        found, local = [], 0
        for interval in self.intervals:
            offset = [0] * len(self.whole)
            offset[self.dim] = interval[0]
            box = Box(tuple(offset), self._extent(interval), local)
            found.append(box)
            local += box.numel
        return tuple(found)

    def _extent(self, interval: tuple[int, int]) -> tuple[int, ...]:
        shape = list(self.whole)
        shape[self.dim] = interval[1] - interval[0]
        return tuple(shape)


def _position(number: int, shape: Sequence[int]) -> tuple[int, ...]:
    """Index of an element of a tensor of ``shape``, given its number in row-major order."""
    found = []
    for extent in reversed(shape):
        number, place = divmod(number, extent)
        found.append(place)
    return tuple(reversed(found))


@dataclass(frozen=True)
class Outputs:
    """Which output features of a column-parallel layer ranks compute, and which each one uses.

    Features that one rank uses lie there. Those that several use (keys and values of a head that
    ranks share) are computed in equal parts and gathered.

    Args:
        kept: for each rank the features that it computes: first its own, then its part of those
            that are gathered.
        own: for each rank how many of these are its own.
        order: for each rank, which of (its own, then the gathered parts of all ranks, each as long
            as the longest) it uses, in order of features; ``None`` where nothing is gathered.
    """

    kept: tuple[Runs, ...]
    own: tuple[int, ...]
    order: tuple[tuple[int, ...] | None, ...]

    @classmethod
    def of(cls, users: Sequence[Sequence[int]], ranks: int) -> Outputs:
        """Share out features, given the ranks that use each."""
        own: list[list[int]] = [[] for _ in range(ranks)]
        common = [feature for feature, who in enumerate(users) if len(who) != 1]
        for feature, who in enumerate(users):
            if len(who) == 1:
                own[who[0]].append(feature)
        parts = [common[start:stop] for start, stop in shares(len(common), ranks)]
        longest = max(map(len, parts))
        place = {f: r * longest + i for r, part in enumerate(parts) for i, f in enumerate(part)}
        order: list[tuple[int, ...] | None] = []
        for rank in range(ranks):
            index = {feature: i for i, feature in enumerate(own[rank])}
            index |= {f: len(own[rank]) + place[f] for f in common if rank in users[f]}
            order.append(tuple(index[f] for f in sorted(index)) if common else None)
        kept = tuple(runs([*mine, *part]) for mine, part in zip(own, parts, strict=True))
        return cls(kept, tuple(map(len, own)), tuple(order))

    def used(self, rank: int) -> int:
        """How many features ``rank`` goes on with."""
        order = self.order[rank]
        return self.own[rank] if order is None else len(order)

    def features(self, rank: int) -> list[int]:
        """The features that ``rank`` goes on with, in its order."""
        lists = [[f for start, stop in kept for f in range(start, stop)] for kept in self.kept]
        order = self.order[rank]
        if order is None:
            return lists[rank]
        parts = [each[count:] for each, count in zip(lists, self.own, strict=True)]
        longest = max(map(len, parts))
        common = [f for part in parts for f in part + [-1] * (longest - len(part))]
        every = lists[rank][: self.own[rank]] + common
        return [every[place] for place in order]
