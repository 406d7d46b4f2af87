"""Where parameters lie in a flat buffer that is cut into one shard per rank: pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

ALIGNMENT = 16
"""Shards are multiples of this many elements: 64 bytes of float32, a cache line."""

WORTH_PAGES = 64
"""From so many pages on a shard is rounded up to whole ones, which adds at most 1.6 %."""


@dataclass(frozen=True, slots=True)
class Part:
    """The part of one parameter that lies in one shard.

    Args:
        index: which parameter.
        start: first element held, in the flattened parameter.
        numel: elements held.
        offset: where they begin in the shard.
    """

    index: int
    start: int
    numel: int
    offset: int


@dataclass(frozen=True)
class Packing:
    """A flat layout of ``ranks * shard`` elements.

    Every parameter is contiguous in it. Between and after them is padding.

    Args:
        numels: elements of each parameter.
        offsets: where each begins.
        shard: elements of one shard.
        ranks: number of shards.
    """

    numels: tuple[int, ...]
    offsets: tuple[int, ...]
    shard: int
    ranks: int

    @property
    def numel(self) -> int:
        """Elements of all shards, padding included."""
        return self.shard * self.ranks

    def parts(self, rank: int) -> Iterator[Part]:
        """What of each parameter lies in shard ``rank``, in order of the parameters.

        Parameters without elements lie in the shard in which they begin.
        """
        low, high = rank * self.shard, (rank + 1) * self.shard
        for index, (offset, numel) in enumerate(zip(self.offsets, self.numels, strict=True)):
            start, stop = max(low, offset), min(high, offset + numel)
            if start < stop:
                yield Part(index, start - offset, stop - start, start - low)
            elif numel == 0 and rank == min(offset // self.shard, self.ranks - 1):
                yield Part(index, 0, 0, offset - low)

    def gaps(self) -> Iterator[tuple[int, int]]:
        """The padding, as (offset, numel)."""
        at = 0
        for offset, numel in sorted(zip(self.offsets, self.numels, strict=True)):
            if offset > at:
                yield at, offset - at
            at = max(at, offset + numel)
        if self.numel > at:
            yield at, self.numel - at


def pack(
    numels: Sequence[int],
    ranks: int,
    grain: Literal["element", "tensor"],
    page: int = 0,
) -> Packing:
    """Lay out parameters for ``ranks`` shards.

    With grain ``"element"`` they follow one another and are cut wherever a shard ends, so that
    shards are equal up to padding. With grain ``"tensor"`` every parameter lies whole in one
    shard, the largest placed first, each where least is; shards are then as long as the fullest.

    Args:
        numels: elements of each parameter.
        ranks: number of shards.
        grain: where parameters may be cut.
        page: make shards a multiple of this many elements, unless they have only few pages.
    """
    if grain == "element":
        offsets, at = [], 0
        for numel in numels:
            offsets.append(at)
            at += numel
        return Packing(tuple(numels), tuple(offsets), _aligned(-(-at // ranks), page), ranks)
    filled = [0] * ranks
    homes = [0] * len(numels)
    for index in sorted(range(len(numels)), key=lambda i: -numels[i]):
        homes[index] = min(range(ranks), key=filled.__getitem__)
        filled[homes[index]] += numels[index]
    shard = _aligned(max(filled), page)
    at_in = [rank * shard for rank in range(ranks)]
    placed = []
    for index, numel in enumerate(numels):
        placed.append(at_in[homes[index]])
        at_in[homes[index]] += numel
    return Packing(tuple(numels), tuple(placed), shard, ranks)


def _aligned(numel: int, page: int) -> int:
    step = page if page and numel >= WORTH_PAGES * page else ALIGNMENT
    return max(-(-numel // step), 1) * step
