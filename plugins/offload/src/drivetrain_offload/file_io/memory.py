"""Host memory that goes to and from files without being copied on the way."""

from __future__ import annotations

import mmap
from contextlib import suppress

import torch

ALIGNMENT = max(4096, mmap.PAGESIZE)
"""Transfers past the page cache begin at multiples of this, in bytes, in the file and in memory."""

HUGE_PAGE = 2 << 20


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to whole units of :data:`ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


class Pages:
    """Host memory that can be given back to the system while the tensor over it stays.

    It begins at a multiple of :data:`ALIGNMENT`, and is in huge pages where it is large enough.
    Memory is taken when it is first written; what was given back reads as zero. Systems that
    cannot take it back leave it.

    Args:
        numel: elements of :attr:`tensor`.
        dtype: theirs.

    Attributes:
        tensor: flat, on the CPU; zero at first.
    """

    def __init__(self, numel: int, dtype: torch.dtype) -> None:
        nbytes = numel * dtype.itemsize
        unit = ALIGNMENT if nbytes < HUGE_PAGE else HUGE_PAGE
        # Nothing is reserved, since nobody knows how much of it is there at once.
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
        self._memory = mmap.mmap(-1, nbytes + unit, flags=flags)
        if unit == HUGE_PAGE and hasattr(mmap, "MADV_HUGEPAGE"):
            with suppress(OSError):  # a kernel without them
                self._memory.madvise(mmap.MADV_HUGEPAGE)
        memory = torch.frombuffer(self._memory, dtype=torch.uint8)
        start = -memory.data_ptr() % unit
        self.tensor = memory[start : start + nbytes].view(dtype)

    def give_back(self) -> None:
        """Let the system have the memory; nothing may be moving there."""
        if hasattr(mmap, "MADV_DONTNEED"):
            self._memory.madvise(mmap.MADV_DONTNEED)


def aligned_empty(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """A flat host tensor [numel] of any values that begins at a multiple of :data:`ALIGNMENT`.

    Large ones take huge pages where the system has them: a device is then told of a few ranges
    instead of every 4 KiB, which makes a fast disk about twice as fast and costs a third of the
    processor time. Several buffers are best cut from one tensor.
    """
    nbytes = numel * dtype.itemsize
    if nbytes >= HUGE_PAGE:
        return Pages(numel, dtype).tensor
    memory = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device="cpu")
    start = -memory.data_ptr() % ALIGNMENT
    return memory[start : start + nbytes].view(dtype)
