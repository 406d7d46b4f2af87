"""What only some operating systems have, and what stands in for it elsewhere."""

from __future__ import annotations

import mmap
import os
import sys
from contextlib import suppress

try:
    import fcntl as fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import resource
except ImportError:
    resource = None  # type: ignore[assignment]

_HAS_USAGE = bool(resource)


def pages(size: int) -> memoryview:
    """Fresh memory of whole pages, huge ones where there are any: a disk is told of fewer ranges.

    Args:
        size: in bytes.
    """
    if hasattr(mmap, "MAP_ANONYMOUS"):
        memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    else:
        memory = mmap.mmap(-1, size)
    with suppress(AttributeError, OSError):
        memory.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(memory)


def peak_memory() -> int:
    """Most memory that this process has had, in bytes; 0 where the system does not tell."""
    if not _HAS_USAGE:
        return 0
    unit = {"darwin": 1}.get(sys.platform, 1024)
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def total_memory() -> int:
    """Memory of this machine, in bytes; 0 where the system does not tell."""
    if not hasattr(os, "sysconf"):
        return 0
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
