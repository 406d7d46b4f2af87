"""What an allocator holds beside what is in use, by playing back what was asked of it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable

_MIB = 1 << 20

Request = tuple[int, int]
"""Which piece of memory, and how many bytes more (or, all of it, fewer) it has."""


class _Free:
    """Stretches of addresses that are free: the smallest that is large enough is taken."""

    def __init__(self) -> None:
        self._by_size: list[tuple[int, int]] = []
        self._begins: dict[int, int] = {}
        self._ends: dict[int, int] = {}

    def add(self, begin: int, size: int) -> tuple[int, int]:
        """Free a stretch; return it joined with its neighbours."""
        if begin in self._ends:
            before = self._ends[begin]
            length = self._begins[before]
            self.remove(before)
            begin, size = before, size + length
        if begin + size in self._begins:
            length = self._begins[begin + size]
            self.remove(begin + size)
            size += length
        self._begins[begin], self._ends[begin + size] = size, begin
        insort(self._by_size, (size, begin))
        return begin, size

    def remove(self, begin: int) -> None:
        """Take a whole stretch away."""
        size = self._begins.pop(begin)
        del self._ends[begin + size]
        del self._by_size[bisect_left(self._by_size, (size, begin))]

    def take(self, size: int) -> int | None:
        """Take the beginning of a stretch; ``None`` if none is large enough."""
        at = bisect_left(self._by_size, (size, -1))
        if at == len(self._by_size):
            return None
        length, begin = self._by_size[at]
        self.remove(begin)
        if length > size:
            self.add(begin + size, length - size)
        return begin


def heap_peak(most: int) -> int:
    """Bytes that a process takes for ``most`` bytes of tensors at once.

    The C library's heap keeps what is free between what is not. With each tensor in pages of its
    own a job takes what is in use within 2 % (measured); with the heap's defaults 7 to 14 % more,
    of which this is the middle.
    """
    return int(1.1 * most)


def caching_peak(requests: Iterable[Request]) -> int:
    """Most bytes that torch's caching allocator reserves on a GPU.

    Blocks are multiples of 512 bytes; those up to 1 MiB come from segments of 2 MiB, those up to
    10 MiB from segments of 20 MiB, others have a segment of their own in multiples of 2 MiB. What
    is free stays reserved, and serves what fits (``c10/cuda/CUDACachingAllocator.cpp``).
    """
    pools = {True: _Free(), False: _Free()}
    where: dict[int, tuple[int, int, bool]] = {}
    reserved, address = 0, 0
    for piece, change in requests:
        if change > 0:
            size = -(-change // 512) * 512
            small = size <= _MIB
            begin = pools[small].take(size)
            if begin is None:
                segment = 2 * _MIB if small else 20 * _MIB
                if size >= 10 * _MIB:
                    segment = -(-size // (2 * _MIB)) * 2 * _MIB
                begin = address
                address += segment + 1  # a gap, so that segments are not joined
                reserved += segment
                if segment > size:
                    pools[small].add(begin + size, segment - size)
            where[piece] = (begin, size, small)
        elif piece in where:
            begin, size, small = where.pop(piece)
            pools[small].add(begin, size)
    return reserved
