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

_MAY_MOVE, _FIXED, _LEAVE_MAPPED = 1, 2, 4
"""Flags of Linux's ``mremap``; the last one needs Linux 5.7."""


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
        # Nothing is reserved, since nobody knows how much of it is there at once.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._memory = mmap.mmap(-1, (self._frames * unit or nbytes) + unit, flags=flags)
        if is_large and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(self._memory, dtype=torch.uint8)
        start = -memory.data_ptr() % unit
        self.tensor = memory[start : start + nbytes].view(dtype)
        self._filled = 0
        """How many frames have memory, the first ones, while nobody uses it."""

    def take(self) -> None:
        """Have memory to be written: what others have given back, and of the system."""
        with _lock:
            _idle.pop(self, None)
            for donor in list(_idle):
                if self._filled == self._frames:
                    break
                self._fill_from(donor)
            self._filled = self._frames  # the system fills the rest when it is written

    def give_back(self) -> None:
        """Have no memory; nothing may be moving there."""
        if self._frames and _mremap() is not None:
            with _lock:
                self._filled = self._frames
                _idle[self] = None
        elif hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED)

    def _fill_from(self, donor: Pages) -> None:
        move = _mremap()
        assert move is not None, "nobody is idle where memory cannot be passed on"
        count = min(self._frames - self._filled, donor._filled)
        nbytes = count * HUGE_PAGE
        source = donor.tensor.data_ptr() + (donor._filled - count) * HUGE_PAGE
        target = self.tensor.data_ptr() + self._filled * HUGE_PAGE
        if count and move(source, nbytes, target):
            self._filled += count
            donor._filled -= count


_idle: weakref.WeakKeyDictionary[Pages, None] = weakref.WeakKeyDictionary()
"""Those whose memory others may have; the first ones have waited longest."""
_lock = threading.Lock()


@cache
def _mremap() -> Callable[[int, int, int], bool] | None:
    """Moves the memory at (address, bytes) to another address; ``None`` if the system cannot."""
    if sys.platform != "linux":
        return None
    call = ctypes.CDLL(None, use_errno=True).mremap
    size, pointer = ctypes.c_size_t, ctypes.c_void_p
    call.argtypes, call.restype = [pointer, size, size, ctypes.c_int, pointer], pointer
    flags = _MAY_MOVE | _FIXED | _LEAVE_MAPPED

    def move(source: int, nbytes: int, target: int) -> bool:
        return bool(call(source, nbytes, nbytes, flags, target) == target)

    trial = torch.frombuffer(mmap.mmap(-1, 4 * mmap.PAGESIZE), dtype=torch.uint8)
    first, page = trial.data_ptr(), mmap.PAGESIZE
    return move if move(first, page, first + 2 * page) else None
