"""Arithmetic of rectangles of a tensor: which overlap, what is left of one, whether they cover it.

A :data:`Region` is a rectangle by its corners. Loading a checkpoint and moving fragments between
ranks both search here.
"""

from __future__ import annotations

import operator
import secrets
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from math import prod

import torch

Region = tuple[tuple[int, ...], tuple[int, ...]]
"""Where a rectangle begins and ends, per dimension."""

_PRIME = (1 << 127) - 1


class Boxes:
    """Rectangles of one tensor, by column, so that a search is a few tensor operations.

    A search looks only at those that it may meet along the first dimension, so that it takes
    logarithmic time where they cut that one into intervals.

    Args:
        offsets: where each begins [boxes, dimensions], integers.
        sizes: extents of each [boxes, dimensions].
    """

    def __init__(self, offsets: torch.Tensor, sizes: torch.Tensor) -> None:
        self._low, self._high = offsets, offsets + sizes
        self._order: torch.Tensor | None = None

    def overlaps(self, region: Region) -> Iterator[tuple[int, Region]]:
        """Number of each box that overlaps ``region``, with what they have in common."""
        begin, end = (torch.tensor(corner, dtype=torch.int64) for corner in region)
        near = self._near(region)
        low = torch.maximum(self._low[near], begin)
        high = torch.minimum(self._high[near], end)
        for place in (low < high).all(dim=1).nonzero().flatten().tolist():
            yield int(near[place]), (tuple(low[place].tolist()), tuple(high[place].tolist()))

    def _near(self, region: Region) -> torch.Tensor:
        """Numbers of boxes that may overlap, by the first dimension."""
        if self._order is None:
            first = self._low[:, :1].sum(dim=1)  # zeros where there is no dimension
            self._starts, self._order = first.sort(stable=True)
            last = self._high[:, :1].sum(dim=1)[self._order]
            self._reach = last.cummax(dim=0).values if last.numel() else last
        if not region[0]:
            return self._order
        stop = int(torch.searchsorted(self._starts, region[1][0]))
        start = int(torch.searchsorted(self._reach, region[0][0], right=True))
        return self._order[start:stop]


def common(one: Region, other: Region) -> Region | None:
    """The rectangle that two have in common, if there is one."""
    low = tuple(map(max, one[0], other[0]))
    high = tuple(map(min, one[1], other[1]))
    return (low, high) if all(map(operator.lt, low, high)) else None


def without(region: Region, hole: Region) -> Iterator[Region]:
    """Cut what is left of ``region`` into rectangles, if ``hole``, a part of it, is taken away."""
    low, high = list(region[0]), list(region[1])
    for axis, (first, last) in enumerate(zip(*hole, strict=True)):
        if low[axis] < first:
            yield tuple(low), (*high[:axis], first, *high[axis + 1 :])
            low[axis] = first
        if last < high[axis]:
            yield (*low[:axis], last, *low[axis + 1 :]), tuple(high)
            high[axis] = last


def extents(region: Region) -> tuple[int, ...]:
    """Extent of a rectangle per dimension."""
    return tuple(last - first for first, last in zip(*region, strict=True))


def cut(region: Region, most: int) -> Iterator[Region]:
    """Cut a rectangle into parts of at most ``most`` elements each, in row-major order."""
    sizes = extents(region)
    if prod(sizes) <= most:
        yield region
        return
    axis = next(axis for axis, size in enumerate(sizes) if size > 1)
    step = max(most // prod(sizes[axis + 1 :]), 1)
    low, high = region
    for first in range(low[axis], high[axis], step):
        last = min(first + step, high[axis])
        yield from cut(
            ((*low[:axis], first, *low[axis + 1 :]), (*high[:axis], last, *high[axis + 1 :])), most
        )


def covers_once(
    boxes: Iterable[tuple[Sequence[int], Sequence[int]]], low: Sequence[int], high: Sequence[int]
) -> bool:
    """True if boxes, each from a low to a high corner, hold each element of a rectangle once.

    An element at position (i, j, ...) weighs x^i y^j ..., for random x, y, ... modulo a prime. The
    weight of a box is a product of geometric series. If the boxes' weights sum up to that of the
    rectangle, the boxes cover it, but for a chance of about 2^-60; a comparison of all pairs of
    boxes would take minutes where there are many. Boxes may not reach out of the rectangle.
    """
    bases = [secrets.randbelow(_PRIME - 2) + 2 for _ in low]

    @cache
    def power(axis: int, at: int) -> int:
        return pow(bases[axis], at, _PRIME)

    def weight(begin: Sequence[int], end: Sequence[int]) -> int:
        # Without the denominators of the series, which are the same for all boxes.
        product = 1
        for axis, (first, last) in enumerate(zip(begin, end, strict=True)):
            product = product * (power(axis, last) - power(axis, first)) % _PRIME
        return product

    return sum(weight(*box) for box in boxes) % _PRIME == weight(low, high)
