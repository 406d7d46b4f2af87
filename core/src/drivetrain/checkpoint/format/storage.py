"""Where checkpoints lie: a handful of file operations, on a file system or beyond.

All that :class:`LocalStorage` does to a disk goes through functions of the module ``os``, so that
tests can end a process before, or in the middle of, each of them.
"""

from __future__ import annotations

import errno
import os
import threading
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from drivetrain.checkpoint.format.plain_file import open_plain, path_below
from drivetrain.errors import CheckpointError
from drivetrain.paths import at_home
from drivetrain.plan.registry import Registry
from drivetrain.system import fcntl, pages

if TYPE_CHECKING:
    from typing_extensions import Buffer

_PAGE = 4096
_BUFFER = 8 << 20
_BINARY = getattr(os, "O_BINARY", 0)  # without it Windows changes the ends of lines


class Sink(ABC):
    """A file that is being written, from begin to end."""

    @abstractmethod
    def write(self, data: Buffer) -> None:
        """Append ``data``."""

    @abstractmethod
    def close(self) -> None:
        """Return once everything written is durable; called once, not after an error."""

    def abandon(self) -> None:  # noqa: B027 - most hold nothing
        """Let go of the file after an error, of :meth:`close` too; what is written is no use."""


class Storage(ABC):
    """Files by path below a root; paths have forward slashes.

    Reads may come from several threads at once. Every method raises ``OSError`` when the storage
    fails, and :class:`CheckpointError` when a file to be read is missing or too short.

    Args:
        root: what the client calls the place.
    """

    def __init__(self, root: str) -> None:
        self.root = root

    def where(self, path: str) -> str:
        """``path`` as messages name it."""
        return f"{self.root.rstrip('/')}/{path}"

    @abstractmethod
    def create(self, path: str) -> Sink:
        """Begin a new file, and its folder if need be; may be incomplete until it is closed."""

    @abstractmethod
    def put(self, path: str, data: bytes) -> None:
        """Give a file new contents in one durable step: readers see the old or the new ones.

        After an error they may see either; reading tells which.
        """

    @abstractmethod
    def size(self, path: str) -> int | None:
        """Bytes of a file; ``None`` when there is none."""

    @abstractmethod
    def read(self, path: str, offset: int, into: Buffer) -> None:
        """Fill ``into`` with the bytes from ``offset`` on."""

    @abstractmethod
    def names(self, folder: str = "") -> list[str]:
        """Files and folders directly in ``folder``, sorted; none when it does not exist."""

    @abstractmethod
    def remove(self, path: str) -> None:
        """Remove a file or an empty folder; missing is fine, a folder with files stays."""

    def is_link(self, path: str) -> bool:
        """True if ``path`` only points to a file or folder that may lie outside of the root."""
        return False

    def close(self) -> None:  # noqa: B027 - most need nothing
        """Let go of files that are open for reading; the storage can be used on."""

    @contextmanager
    def writing(self, path: str) -> Iterator[Sink]:
        """Begin a new file that is complete when the block ends without an error."""
        sink = self.create(path)
        try:
            yield sink
            sink.close()
        except BaseException:
            sink.abandon()
            raise

    def get(self, path: str, limit: int) -> bytes:
        """The contents of a file of at most ``limit`` bytes.

        Raises:
            CheckpointError: missing, or larger.
        """
        size = self.size(path)
        if size is None:
            raise CheckpointError(f"checkpoint file {self.where(path)} is missing")
        if size > limit:
            raise CheckpointError(
                f"checkpoint file {self.where(path)} is damaged: it has {size:,} bytes, and no "
                f"such file has more than {limit:,}"
            )
        data = bytearray(size)
        self.read(path, 0, data)
        return bytes(data)


def open_storage(root: str | os.PathLike[str]) -> Storage:
    """The storage for a path, or for a URL whose scheme an installed package serves.

    Raises:
        CheckpointError: nobody serves the scheme.
    """
    place = os.fspath(root)
    scheme, separator, _ = place.partition("://")
    if not separator:
        return LocalStorage(at_home(place))
    registry = Registry.installed()
    if registry.find("storages", scheme) is None:
        raise CheckpointError(
            f"no installed package stores checkpoints at {scheme}:// URLs, so {place} cannot be "
            "opened: pip install drivetrain-checkpoint-tools serves what fsspec does"
        )
    storage: Storage = registry.load("storages", scheme)(place)
    return storage


class LocalStorage(Storage):
    """A folder that all ranks see. What is read there are regular files, and no links out of it.

    Args:
        root: the folder.
        boundary: a folder above it that links may not lead out of; ``root`` by default.
    """

    def __init__(self, root: str, boundary: str | None = None) -> None:
        super().__init__(root)
        self._boundary = boundary
        self._files: dict[str, int] = {}
        self._lock = threading.Lock()
        weakref.finalize(self, _close_all, self._files)  # for who forgets to close it

    def create(self, path: str) -> Sink:
        self._forget(path)
        return _LocalSink(self._path(path))

    def put(self, path: str, data: bytes) -> None:
        self._forget(path)
        target = self._path(path)
        aside = f"{target}.new"
        sink = _LocalSink(aside)
        try:
            sink.write(data)
            sink.close()
            os.replace(aside, target)
        except BaseException:
            sink.abandon()
            with suppress(OSError):  # the first error is the one to be told of
                os.unlink(aside)
            raise
        _sync_folder(os.path.dirname(target))

    def size(self, path: str) -> int | None:
        try:
            file = self.open(path)
        except (FileNotFoundError, NotADirectoryError):
            return None
        try:
            return os.fstat(file).st_size
        finally:
            os.close(file)

    def read(self, path: str, offset: int, into: Buffer) -> None:
        file, rest = self._open(path), memoryview(into)
        end = offset + len(rest)
        while rest:
            count = self._read_at(file, rest, end - len(rest))
            if not count:
                raise CheckpointError(
                    f"checkpoint file {self.where(path)} is damaged: it ends at byte "
                    f"{end - len(rest):,}, but {end:,} are needed"
                )
            rest = rest[count:]

    def _read_at(self, file: int, into: memoryview, offset: int) -> int:
        if hasattr(os, "preadv"):
            return os.preadv(file, [into], offset)
        with self._lock:  # the position belongs to the descriptor, which threads share
            os.lseek(file, offset, os.SEEK_SET)
            data = os.read(file, len(into))
        into[: len(data)] = data
        return len(data)

    def names(self, folder: str = "") -> list[str]:
        try:
            return sorted(os.listdir(path_below(self.root, folder, self._boundary)))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def open(self, path: str) -> int:
        """A descriptor of a file for reading, which the caller closes.

        Raises:
            FileNotFoundError: there is none.
            CheckpointError: it is no regular file, or a link leads elsewhere.
        """
        return open_plain(path_below(self.root, path, self._boundary))

    def remove(self, path: str) -> None:
        self._forget(path)
        target = self._path(path)
        if not os.path.isdir(target):
            if os.path.lexists(target):
                os.unlink(target)
        elif not os.path.islink(target) and not os.listdir(target):
            os.rmdir(target)

    def is_link(self, path: str) -> bool:
        return os.path.islink(self._path(path))

    def close(self) -> None:
        with self._lock:
            _close_all(self._files)

    def _path(self, path: str) -> str:
        return os.path.join(self.root, path) if path else self.root

    def _forget(self, path: str) -> None:
        """Close a file that is about to be replaced or removed, so that its room is given back."""
        with self._lock:
            if path in self._files:
                _close(self._files.pop(path))

    def _open(self, path: str) -> int:
        with self._lock:
            if path not in self._files:
                try:
                    self._files[path] = self.open(path)
                except FileNotFoundError:
                    raise CheckpointError(
                        f"checkpoint file {self.where(path)} is missing"
                    ) from None
            return self._files[path]


class _LocalSink(Sink):
    """Writes past the page cache where the file system can: the kernel then copies nothing.

    That takes aligned memory and lengths, so what is written goes through two buffers, of which one
    is filled while a thread writes the other, and the last few bytes go the usual way.
    """

    def __init__(self, path: str) -> None:
        self._path = path
        _make_folder(os.path.dirname(os.path.abspath(path)))
        self._buffer, self._spare = (pages(_BUFFER) for _ in range(2))
        self._filled = 0
        self._thread = ThreadPoolExecutor(1, "checkpoint-write")
        self._written: Future[None] | None = None
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC | getattr(os, "O_NOFOLLOW", 0) | _BINARY
        self._file = os.open(path, flags, 0o666)
        self._open = True
        self._direct = False
        with suppress(OSError, AttributeError):  # a file system or a system that cannot
            self._flags = fcntl.fcntl(self._file, fcntl.F_GETFL)
            fcntl.fcntl(self._file, fcntl.F_SETFL, self._flags | getattr(os, "O_DIRECT", 0))
            self._direct = True

    def write(self, data: Buffer) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            count = min(len(rest), _BUFFER - self._filled)
            self._buffer[self._filled : self._filled + count] = rest[:count]
            self._filled, rest = self._filled + count, rest[count:]
            if self._filled == _BUFFER:
                self._wait()
                self._written = self._thread.submit(self._drain, self._buffer)
                self._buffer, self._spare, self._filled = self._spare, self._buffer, 0

    def close(self) -> None:
        self._wait()
        self._thread.shutdown()
        aligned = self._filled // _PAGE * _PAGE
        self._drain(self._buffer[:aligned])
        self._go_through_the_cache()
        self._drain(self._buffer[aligned : self._filled])
        os.fsync(self._file)
        self._let_go()
        _sync_folder(os.path.dirname(self._path))

    def abandon(self) -> None:
        self._thread.shutdown()
        with suppress(OSError):  # the first error is the one to be told of
            self._let_go()

    def _let_go(self) -> None:
        """Close the file once; the system lets go of it even where closing is an error."""
        if self._open:
            self._open = False
            os.close(self._file)

    def _wait(self) -> None:
        if self._written is not None:
            self._written.result()

    def _drain(self, rest: memoryview) -> None:
        while rest:
            try:
                rest = rest[os.write(self._file, rest) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._direct:
                    raise
                self._go_through_the_cache()  # it promised more than it can
            if len(rest) % _PAGE:
                self._go_through_the_cache()  # which says why there is no room for the rest

    def _go_through_the_cache(self) -> None:
        if self._direct:
            fcntl.fcntl(self._file, fcntl.F_SETFL, self._flags)
            self._direct = False


def _close_all(files: dict[str, int]) -> None:
    while files:
        _close(files.popitem()[1])


def _close(file: int) -> None:
    """Close a file that was read; there is nothing left that could be lost."""
    with suppress(OSError):
        os.close(file)


def _make_folder(path: str) -> None:
    if not os.path.isdir(path):
        parent = os.path.dirname(path)
        _make_folder(parent)
        with suppress(FileExistsError):  # another rank was faster
            os.mkdir(path)
        _sync_folder(parent)


def _sync_folder(path: str) -> None:
    """Wait until what was created or renamed inside ``path`` is on the disk."""
    if not hasattr(os, "O_DIRECTORY"):  # Windows opens no folders, and keeps a journal of them
        return
    folder = os.open(path or ".", os.O_RDONLY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)
