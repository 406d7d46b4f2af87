"""Memory that several processes of one host map: anonymous files, so that nothing can be left over.

A segment is a ``memfd``. It has no name in any file system (``/dev/shm`` included) and vanishes
with its last mapping, whoever is killed when. Peers open it through ``/proc/PID/fd``.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path

PAGE = mmap.PAGESIZE


class Mapping:
    """A segment mapped into this process; unmapped when nothing refers to it any more.

    Args:
        descriptor: open file.
        size: bytes, a multiple of the page size.
    """

    def __init__(self, descriptor: int, size: int) -> None:
        self.memory = mmap.mmap(descriptor, size)
        self.block = (ctypes.c_char * size).from_buffer(self.memory)

    @property
    def address(self) -> int:
        """Where the segment is mapped."""
        return ctypes.addressof(self.block)


class OwnSegment:
    """A new segment of this process; peers may open it until :meth:`close_descriptor`.

    Args:
        size: bytes; rounded up to whole pages.

    Raises:
        OSError: there is not that much memory (the pages are reserved, so that using them later
            cannot fail), or anonymous files are not supported.
    """

    def __init__(self, size: int) -> None:
        self.size = -(-size // PAGE) * PAGE
        self.descriptor = os.memfd_create("drivetrain", os.MFD_CLOEXEC)
        try:
            os.posix_fallocate(self.descriptor, 0, self.size)
            self.mapping = Mapping(self.descriptor, self.size)
        except OSError:
            self.close_descriptor()
            raise

    def close_descriptor(self) -> None:
        """End the time in which peers may open the segment."""
        os.close(self.descriptor)


def map_peer(process: int, descriptor: int, size: int) -> Mapping:
    """Map a segment of another process.

    Raises:
        OSError: the process is gone, or the system does not let this one look into it.
    """
    opened = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    try:
        return Mapping(opened, size)
    finally:
        os.close(opened)


def host_identity() -> int:
    """A number that processes share exactly if they run on one host and see each other's ids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116 - follows the magic link
    return (int(boot.replace("-", ""), 16) ^ (namespace * 0x9E3779B97F4A7C15)) & (2**63 - 1)
