"""Files in anonymous memory (memfd) by name, shared by the threads of a keeper."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer


def memory_file() -> int:
    """A new descriptor of memory that lives as long as any process has one."""
    return os.memfd_create("drivetrain-checkpoint", os.MFD_CLOEXEC)


def write_all(file: int, data: Buffer) -> None:
    """Append ``data`` to a file."""
    rest = memoryview(data).cast("B")
    while rest:
        rest = rest[os.write(file, rest) :]


class Files:
    """Descriptors by path, which belong to this object."""

    def __init__(self) -> None:
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()

    def put(self, path: str, file: int) -> None:
        """Take a file over, in place of the one of that path."""
        with self._lock:
            before, self._files[path] = self._files.get(path), file
        if before is not None:
            os.close(before)

    def remove(self, path: str) -> None:
        """Let go of a file; missing is fine."""
        with self._lock:
            file = self._files.pop(path, None)
        if file is not None:
            os.close(file)

    @contextmanager
    def opened(self, path: str) -> Iterator[int | None]:
        """A descriptor for use in the block, though the file is replaced meanwhile."""
        with self._lock:
            file = self._files.get(path)
            own = None if file is None else os.dup(file)
        try:
            yield own
        finally:
            if own is not None:
                os.close(own)

    def names(self, folder: str) -> set[str]:
        """Files and folders directly in ``folder``."""
        start = f"{folder}/" if folder else ""
        with self._lock:
            below = [name.removeprefix(start) for name in self._files if name.startswith(start)]
        return {name.partition("/")[0] for name in below}

    def size(self, path: str) -> int | None:
        """Bytes of a file; ``None`` if there is none."""
        with self.opened(path) as file:
            return None if file is None else os.fstat(file).st_size

    def read(self, path: str, offset: int, count: int) -> bytes | None:
        """Up to ``count`` bytes from ``offset`` on; ``None`` if there is no such file."""
        with self.opened(path) as file:
            if file is None:
                return None
            parts = []
            while count and (part := os.pread(file, count, offset)):
                parts.append(part)
                offset, count = offset + len(part), count - len(part)
            return b"".join(parts)
