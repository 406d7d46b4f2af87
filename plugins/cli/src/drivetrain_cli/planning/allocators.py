"""What an allocator holds beside what is in use, by playing back what was asked of it."""

from __future__ import annotations

from bisect import bisect_left, insort
from collections import defaultdict, deque
from collections.abc import Container, Iterable, Mapping

_MIB = 1 << 20
_PAGE = 4096
_LEAST, _MOST = 128 << 10, 32 << 20
"""glibc maps a block by itself from the first size on; up to the second one, from the size of the
largest that was mapped and freed."""

_ASKED_MORE, _BEFORE = 96, 48
_OUTLIVING = 60
"""Blocks that are freed before what lies beside one of them goes as well."""

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


class _Heap:
    """The C library's ``malloc`` (glibc 2.36), as torch asks it for memory that begins at 64 bytes.

    What is free is joined with free neighbours and serves the smallest request that it holds. A
    request asks for 96 bytes more than it keeps, for the sake of its beginning; what is left over
    of them, before and behind the block, is small enough for objects of other code, which outlive
    the block for some time. So a block of equal size does not fit where one has just been freed,
    and the heap grows to more than is ever in use.

    Args:
        outliving: number of blocks that are freed meanwhile.
    """

    def __init__(self, outliving: int = _OUTLIVING) -> None:
        self._free = _Free()
        self._outliving = outliving
        self._top = self._end = self._mapped = 0
        self._threshold = self._trim = _LEAST
        self._where: dict[int, tuple[int | None, int]] = {}
        self._apart: dict[int, int] = {}
        self._late: deque[tuple[int, int]] = deque()

    @property
    def nbytes(self) -> int:
        """Bytes that the process has for it."""
        return self._end + self._mapped

    def map(self, piece: int, nbytes: int) -> None:
        """Give pages that are none of the heap's."""
        whole = -(-nbytes // _PAGE) * _PAGE
        self._mapped += whole
        self._apart[piece] = whole

    def allocate(self, piece: int, nbytes: int) -> None:
        """Serve a request of torch's."""
        size = -(-(nbytes + 8) // 16) * 16
        asked = size + _ASKED_MORE
        begin = self._free.take(asked)
        if begin is None and asked > self._end - self._top and asked >= self._threshold:
            whole = -(-(asked + 8) // _PAGE) * _PAGE
            self._mapped += whole
            self._where[piece] = (None, whole)
            return
        if begin is None:
            begin = self._top
            self._top += asked
            if self._top > self._end:
                self._end = -(-(self._top + _LEAST) // _PAGE) * _PAGE
        self._where[piece] = (begin + _BEFORE, size)
        self._release(begin + _BEFORE + size, asked - size - _BEFORE)

    def free(self, piece: int) -> None:
        """End what :meth:`allocate` has served, or :meth:`map`."""
        if piece in self._apart:
            self._mapped -= self._apart.pop(piece)
            return
        begin, size = self._where.pop(piece, (None, 0))
        if begin is not None:
            self._release(begin, size)
            self._late.append((begin - _BEFORE, _BEFORE))
            if len(self._late) > self._outliving:
                self._release(*self._late.popleft())
        else:
            self._mapped -= size
            if self._threshold < size <= _MOST:
                self._threshold, self._trim = size, 2 * size

    def _release(self, begin: int, size: int) -> None:
        begin, size = self._free.add(begin, size)
        if begin + size == self._top:
            self._free.remove(begin)
            self._top = begin
            if self._end - self._top >= self._trim:
                self._end = -(-(self._top + _LEAST) // _PAGE) * _PAGE


def heap_peak(
    requests: Iterable[Request],
    apart: Container[int] = (),
    threads: Mapping[int, int] | None = None,
) -> int:
    """Most bytes that the C library's heaps have for a process's tensors, by playing back requests.

    How long small objects stay beside blocks is fitted to what 24 jobs took, which this meets
    within 7 %; what is in use at once, as a sum, is up to 13 % less than they took.

    Args:
        requests: in order.
        apart: pieces that are pages which other code has mapped; they count, too.
        threads: piece -> thread that asks, where that is not the first one. Each has a heap.
    """
    # What other threads have is asked for by nobody else there, so nothing small lies between.
    heaps: defaultdict[int, _Heap] = defaultdict(lambda: _Heap(outliving=0))
    heaps[0] = _Heap()
    threads, most = threads or {}, 0
    for piece, change in requests:
        heap = heaps[threads.get(piece, 0)]
        if change > 0:
            (heap.map if piece in apart else heap.allocate)(piece, change)
            most = max(most, sum(each.nbytes for each in heaps.values()))
        else:
            heap.free(piece)
    return most


def heap_allowance(most: int) -> int:
    """Bytes to leave free beside ``most`` where memory has a limit that must not be reached.

    For how a heap is cut up differs a little from run to run; and for what kernels keep for
    themselves, code that they generate and memory that they compute in.
    """
    return most // 33 + (32 << 20)


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
