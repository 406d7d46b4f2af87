"""Host memory that moves to and from files without being copied on the way."""

from __future__ import annotations

import mmap

import torch

ALIGNMENT = max(4096, mmap.PAGESIZE)
"""Transfers past the page cache begin at multiples of this, in bytes, in the file and in memory."""


def aligned(nbytes: int) -> int:
    """``nbytes`` rounded up to whole units of :data:`ALIGNMENT`."""
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def aligned_empty(numel: int, dtype: torch.dtype) -> torch.Tensor:
    """An uninitialised flat host tensor [numel] that begins at a multiple of :data:`ALIGNMENT`."""
    nbytes = numel * dtype.itemsize
    raw = torch.empty(nbytes + ALIGNMENT, dtype=torch.uint8, device="cpu")
    start = -raw.data_ptr() % ALIGNMENT
    return raw[start : start + nbytes].view(dtype)
