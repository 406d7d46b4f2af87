"""Host memory that comes and goes under tensors, in whole pages that these pass on to each other.

A page that the system takes back and gives again is cleared first, which on a virtual machine takes
longer than to read it from a fast disk. So memory that one tensor has given back goes to the next
that needs some: the page tables change, and no byte is touched.
"""

from __future__ import annotations

import ctypes
import mmap
import sys
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from functools import cache

import torch

ALIGNMENT = max(4096, mmap.PAGESIZE)
"""Transfers past the page cache begin at multiples of this, in bytes, in the file and in memory."""

HUGE_PAGE = 2 << 20

_MOST_FRAMES = 16_384
"""Huge pages that are passed on: each may become a mapping, of which a process has 65,530."""
_MAY_MOVE, _FIXED, _LEAVE_MAPPED = 1, 2, 4
"""Flags of Linux's ``mremap``; the last one needs Linux 5.7."""
_MAP_FIXED = 0x10
"""Flag of Linux's ``mmap`` that Python does not name."""
_PRIVATE = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
"""Nothing is reserved, since nobody knows how much of it is there at once."""


class Pages:
    """Memory [numel] that can be given back and taken again while the tensor over it stays.

    It begins at a multiple of :data:`ALIGNMENT`, and is in huge pages where it is large enough.
    What was given back serves others of this class that take some. Together they hold as much as
    was taken at once at most, until they are gone. Where memory cannot be passed on, the system
    gets it back.

    Args:
        numel: elements of :attr:`tensor`.
        dtype: theirs.

    Attributes:
        tensor: flat, on the CPU; zero at first, anything when it was taken again.
    """

    def __init__(self, numel: int, dtype: torch.dtype) -> None:
        nbytes = numel * dtype.itemsize
        is_large = nbytes >= HUGE_PAGE
        unit = HUGE_PAGE if is_large else ALIGNMENT
        self._frames = -(-nbytes // HUGE_PAGE) if is_large else 0
        self._memory = mmap.mmap(-1, (self._frames * unit or nbytes) + unit, flags=_PRIVATE)
        if is_large and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(self._memory, dtype=torch.uint8)
        start = -memory.data_ptr() % unit
        self.tensor = memory[start : start + nbytes].view(dtype)
        self._filled = 0
        """How many frames have memory, the first ones, while nobody uses it."""
        with _lock:
            _known[self] = self._frames
            fits = sum(_known.values()) <= _MOST_FRAMES
        self._passes_on = is_large and fits and _mremap() is not None

    def take(self) -> None:
        """Have memory to be written: what others have given back, and of the system."""
        with _lock:
            _idle.pop(self, None)
            for donor in list(_idle) if self._passes_on else ():
                if self._filled == self._frames:
                    break
                self._fill_from(donor)
            self._filled = self._frames  # the system fills the rest when it is written

    def give_back(self) -> None:
        """Have no memory; nothing may be moving there."""
        if self._passes_on:
            with _lock:
                self._filled = self._frames
                _idle[self] = None
        elif hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED)

    def _fill_from(self, donor: Pages) -> None:
        move = _mremap()
        assert move is not None, "nobody is idle where memory cannot be passed on"
        count = min(self._frames - self._filled, donor._filled)
        source = donor.tensor.data_ptr() + (donor._filled - count) * HUGE_PAGE
        target = self.tensor.data_ptr() + self._filled * HUGE_PAGE
        # One by one: the system moves within one mapping only, and whoever was filled by several
        # donors has several.
        for at in range(0, count * HUGE_PAGE, HUGE_PAGE):
            move(source + at, HUGE_PAGE, target + at)
        self._filled += count
        donor._filled -= count


_idle: weakref.WeakKeyDictionary[Pages, None] = weakref.WeakKeyDictionary()
"""Those whose memory others may have; the first ones have waited longest."""
_known: weakref.WeakKeyDictionary[Pages, int] = weakref.WeakKeyDictionary()
"""All, with their numbers of frames."""
_lock = threading.Lock()


@cache
def _mremap() -> Callable[[int, int, int], bool] | None:
    """Moves the memory at (address, bytes) to another address; ``None`` if the system cannot.

    Answers whether it has; if not, there is other memory at that address, which reads as zero.
    """
    if sys.platform != "linux":
        return None
    library = ctypes.CDLL(None, use_errno=True)
    size, pointer, number = ctypes.c_size_t, ctypes.c_void_p, ctypes.c_int
    remap, map_anew = library.mremap, library.mmap
    remap.argtypes, remap.restype = [pointer, size, size, number, pointer], pointer
    map_anew.argtypes = [pointer, size, number, number, number, ctypes.c_long]
    map_anew.restype = pointer
    access = mmap.PROT_READ | mmap.PROT_WRITE

    def move(source: int, nbytes: int, target: int) -> bool:
        flags = _MAY_MOVE | _FIXED | _LEAVE_MAPPED
        if remap(source, nbytes, nbytes, flags, target) == target:
            return True
        # A call that fails may have unmapped the target before.
        map_anew(target, nbytes, access, _PRIVATE | _MAP_FIXED, -1, 0)
        return False

    trial = torch.frombuffer(mmap.mmap(-1, 4 * mmap.PAGESIZE, flags=_PRIVATE), dtype=torch.uint8)
    first, page = trial.data_ptr(), mmap.PAGESIZE
    return move if move(first, page, first + 2 * page) else None
