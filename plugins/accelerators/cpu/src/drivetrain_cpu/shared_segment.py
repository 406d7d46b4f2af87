"""Memory that several processes of one host map: anonymous files, so that nothing can be left over.

A segment is a ``memfd``. It has no name in any file system (``/dev/shm`` included) and vanishes
with its last mapping, whoever is killed when. Peers open it through ``/proc/PID/fd``.
"""

from __future__ import annotations

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

PAGE = mmap.PAGESIZE

_MAP_FIXED = 0x10  # Linux, on every architecture; the module mmap has no name for it
_RESERVED = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS
_NO_ACCESS = 0  # PROT_NONE
_FIXED = mmap.MAP_SHARED | _MAP_FIXED
_FAILED = ctypes.c_void_p(-1).value

_libc = ctypes.CDLL(None, use_errno=True)
_libc.mmap.restype = ctypes.c_void_p
_libc.mmap.argtypes = [
    ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_long,
]  # fmt: skip
_libc.munmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]


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
        except OSError:
            self.close_descriptor()
            raise

    def close_descriptor(self) -> None:
        """End the time in which peers may open the segment."""
        os.close(self.descriptor)


class Row:
    """Segments of one size mapped one after another, so that they read as one.

    Args:
        count: number of segments.
        size: bytes of each, a multiple of the page size.

    Raises:
        OSError: there are not that many addresses.
    """

    def __init__(self, count: int, size: int) -> None:
        self.size = size
        self.address = _map(None, count * size, _NO_ACCESS, _RESERVED, -1)
        self.block = (ctypes.c_char * (count * size)).from_address(self.address)
        weakref.finalize(self.block, _libc.munmap, self.address, count * size).atexit = False

    def place(self, position: int, descriptor: int) -> None:
        """Map the open file of a segment at its place.

        Raises:
            OSError: it cannot be mapped.
        """
        address = self.address + position * self.size
        _map(address, self.size, mmap.PROT_READ | mmap.PROT_WRITE, _FIXED, descriptor)


@contextmanager
def peer_file(process: int, descriptor: int) -> Iterator[int]:
    """The file of a segment of another process, opened.

    Raises:
        OSError: the process is gone, or the system does not let this one look into it.
    """
    opened = os.open(f"/proc/{process}/fd/{descriptor}", os.O_RDWR | os.O_CLOEXEC)
    try:
        yield opened
    finally:
        os.close(opened)


def _map(address: int | None, size: int, protection: int, flags: int, descriptor: int) -> int:
    found = _libc.mmap(address, size, protection, flags, descriptor, 0)
    if found == _FAILED:
        number = ctypes.get_errno()
        raise OSError(number, os.strerror(number))
    return int(found)


def host_identity() -> int:
    """A number that processes share exactly if they run on one host and see each other's ids."""
    boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    namespace = os.stat("/proc/self/ns/pid").st_ino  # noqa: PTH116 - follows the magic link
    return (int(boot.replace("-", ""), 16) ^ (namespace * 0x9E3779B97F4A7C15)) & (2**63 - 1)
