"""``AsyncFile``: a file that tensors are read from and written to in the background."""

from __future__ import annotations

import atexit
import errno
import logging
import os
import threading
import weakref
from collections import deque
from collections.abc import Callable
from types import TracebackType
from typing import Any, Literal, NoReturn

import torch

from drivetrain_offload.file_io.engine import Engine, Transfer
from drivetrain_offload.file_io.engines import acquire_engine, release_engine, say_once
from drivetrain_offload.file_io.errors import FileIOError
from drivetrain_offload.file_io.faults import Faults
from drivetrain_offload.file_io.settings import EngineName, IOSettings
from drivetrain_offload.host.stall import stalled

logger = logging.getLogger("drivetrain.offload")

Mode = Literal["r", "r+", "w", "x"]

_FLAGS = {
    "r": os.O_RDONLY,
    "r+": os.O_RDWR,
    "w": os.O_RDWR | os.O_CREAT | os.O_TRUNC,
    "x": os.O_RDWR | os.O_CREAT | os.O_EXCL,
}
_DIRECT: int = getattr(os, "O_DIRECT", 0)
_NO_DIRECT = (errno.EINVAL, errno.EOPNOTSUPP)
_WAKE_SECONDS = 0.5
"""How long a wait goes without giving Python's signal handlers a chance."""


class Request:
    """A read or write under way, which keeps its tensor alive; leave that alone until it is over.

    Made by :meth:`AsyncFile.read` and :meth:`AsyncFile.write`.
    """

    def __init__(self, file: AsyncFile, tensor: torch.Tensor, transfer: Transfer) -> None:
        # Both live until the request is over; then nothing here keeps a file open.
        self._file: AsyncFile | None = file
        self._tensor: torch.Tensor | None = tensor
        self._engine, self._path = file.engine, file.path
        self._transfer = transfer
        self._lock = threading.Lock()
        self._error: FileIOError | None = None
        self._heard = False  # somebody was told of the error
        self._process = os.getpid()
        self._ticket = file.engine.submit(transfer)

    def done(self) -> bool:
        """Whether the request is over, well or not; never waits."""
        if not self._lock.acquire(blocking=False):
            return False  # another thread waits for it
        try:
            return self._tensor is None or self._engine.done(self._ticket)
        finally:
            self._lock.release()

    def wait(self) -> None:
        """Return once the request is over.

        Raises:
            FileIOError: it failed; names the file, the bytes and the system's reason. Raised again
                by every call.
        """
        if self._process != os.getpid():
            raise FileIOError(
                "cannot wait in a forked process for a request of its parent on",
                self._path,
                errno.ECHILD,
            )
        file = self._file  # its end waits for its requests, so it must not come inside the lock
        with self._lock:
            if self._tensor is not None:
                with stalled():
                    while not self._engine.wait(self._ticket, _WAKE_SECONDS):
                        pass
                self._settle()
        if self._error is not None:
            self._heard = True
            raise self._error
        del file

    def unheard(self) -> bool:
        """Whether :meth:`wait` would raise what it has told nobody yet."""
        file = self._file  # as in wait
        with self._lock:
            if self._tensor is not None and self._engine.done(self._ticket):
                self._settle()
            unheard = self._error is not None and not self._heard
        del file
        return unheard

    def _settle(self) -> None:
        """Take note of what became of a request that is over, and let go of its tensor."""
        self._error = self._failure()
        self._file = self._tensor = None

    def _failure(self) -> FileIOError | None:
        outcome = self._engine.outcome(self._ticket)
        if outcome.refused and self._file is not None:
            self._file.direct = False
            _say_buffered(self._path)
        if not outcome.error:
            return None
        verb = "write to" if self._transfer.writes else "read from"
        first, stop = outcome.offset, outcome.offset + outcome.nbytes
        return FileIOError(
            f"cannot {verb}", self._path, outcome.error, f", bytes {first} to {stop}"
        )


class AsyncFile:
    """A file that contiguous host tensors are read from and written to, in the background.

    Bytes go past the system's page cache where the file system can (``direct`` tells), whatever
    the alignment; memory of :func:`aligned_empty` and offsets that are multiples of 4096 need no
    copy on the way. Several requests may be under way, but none that overlap. Usable by several
    threads, and closed by leaving its context. The other keyword arguments are those of ``aio``.

    Args:
        path: the file.
        mode: ``"r"`` reads; ``"r+"`` reads and writes; ``"w"`` also makes the file, or empties it;
            ``"x"`` makes it and fails if it exists.
        block_size: bytes of one request to the system.
        queue_depth: blocks under way at once, per thread.
        intra_op_parallelism: threads that share the blocks.
        single_submit: hand blocks to the system one at a time.
        overlap_events: hand over new blocks while others are under way.
        engine: ``"io_uring"``, ``"libaio"``, ``"threads"``, or the first that works.
        opener: called with path and flags in place of :func:`os.open`, like that of :func:`open`.

    Raises:
        FileIOError: the file cannot be opened.
        ConfigError: there is no such engine here.
        ValueError: an argument is out of range.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        *,
        mode: Mode = "r",
        block_size: int = 1 << 20,
        queue_depth: int = 8,
        intra_op_parallelism: int = 1,
        single_submit: bool = False,
        overlap_events: bool = True,
        engine: EngineName = "auto",
        opener: Callable[[str, int], int] | None = None,
    ) -> None:
        self._descriptors: list[int] = []
        if mode not in _FLAGS:
            raise ValueError(f"mode must be one of {', '.join(_FLAGS)}, got {mode!r}")
        self._settings = IOSettings(
            block_size, queue_depth, intra_op_parallelism, single_submit, overlap_events, engine
        )
        self.path = os.fspath(path)
        self._under_way: deque[Request] = deque()
        self._failed: list[Request] = []
        self._lock = threading.Lock()
        self._process = os.getpid()
        opened = self._open(_FLAGS[mode], opener or _open_private)
        try:
            self.engine: Engine = acquire_engine(self._settings)
        except BaseException:
            for descriptor in opened:
                os.close(descriptor)
            raise
        self._descriptors = opened
        self.direct = len(self._descriptors) > 1
        """Whether bytes go past the page cache."""
        self._token: Any = self.engine.open(
            self._descriptors[-1] if self.direct else -1, self._descriptors[0]
        )
        _open_files.add(self)

    # -- transfers ----------------------------------------------------------------------------

    def read(self, tensor: torch.Tensor, offset: int = 0) -> Request:
        """Begin to fill ``tensor`` with the bytes that begin at ``offset``.

        A file that ends before the tensor is full makes the request fail.

        Raises:
            ValueError: the tensor is not contiguous in host memory, or ``offset`` is negative.
        """
        return self._begin(tensor, offset, writes=False)

    def write(self, tensor: torch.Tensor, offset: int = 0) -> Request:
        """Begin to write the bytes of ``tensor`` from ``offset`` on.

        Raises:
            ValueError: the tensor is not contiguous in host memory, or ``offset`` is negative.
        """
        return self._begin(tensor, offset, writes=True)

    def read_sync(self, tensor: torch.Tensor, offset: int = 0) -> None:
        """:meth:`read`, and wait for it."""
        self.read(tensor, offset).wait()

    def write_sync(self, tensor: torch.Tensor, offset: int = 0) -> None:
        """:meth:`write`, and wait for it."""
        self.write(tensor, offset).wait()

    def wait(self) -> None:
        """Wait for every request under way.

        Raises:
            FileIOError: one that nobody has waited for failed; the first of them.
        """
        with self._lock:
            requests, self._under_way, self._failed = (
                [*self._failed, *self._under_way],
                deque(),
                [],
            )
        failures = []
        for request in requests:
            heard = request.done() and not request.unheard()
            try:
                request.wait()
            except FileIOError as error:
                failures += [] if heard else [error]
        if failures:
            raise failures[0]

    # -- the file itself ------------------------------------------------------------------------

    def fileno(self) -> int:
        """A descriptor of the file, for ``os.fsync`` and the like."""
        self._check_open()
        return self._descriptors[0]

    def size(self) -> int:
        """Length of the file in bytes."""
        return os.fstat(self.fileno()).st_size

    def truncate(self, nbytes: int) -> None:
        """Make the file ``nbytes`` long; new bytes are zero and take no space yet.

        Raises:
            FileIOError: the system refuses.
        """
        try:
            os.ftruncate(self.fileno(), nbytes)
        except OSError as error:
            self._refuse(f", to {nbytes} bytes", "cannot cut", error)

    def preallocate(self, nbytes: int) -> None:
        """Reserve space, so that no later write of the first ``nbytes`` finds the disk full.

        Raises:
            FileIOError: there is not so much space.
        """
        if nbytes == 0:
            return
        try:
            os.posix_fallocate(self.fileno(), 0, nbytes)
        except OSError as error:
            self._refuse(f", {nbytes} bytes", "cannot reserve space for", error)

    def close(self) -> None:
        """Wait for what is under way and close the file. May be called repeatedly.

        Raises:
            FileIOError: a request failed that nobody has waited for.
        """
        if not self._descriptors:
            return
        _open_files.discard(self)
        is_ours = self._process == os.getpid()
        try:
            if is_ours:
                self.wait()
        finally:
            descriptors, self._descriptors = self._descriptors, []
            for descriptor in descriptors:
                os.close(descriptor)
            if is_ours:
                self.engine.forget(self._token)
                release_engine(self._settings)

    def __enter__(self) -> AsyncFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def __del__(self) -> None:
        self.close()

    def _open(self, flags: int, opener: Callable[[str, int], int]) -> list[int]:
        """Descriptors of the file: buffered, and direct where there is such a thing."""
        opened: list[int] = []
        try:
            opened.append(opener(self.path, flags | os.O_CLOEXEC))
            again = flags & ~(os.O_CREAT | os.O_EXCL | os.O_TRUNC) | os.O_CLOEXEC
            if _DIRECT:
                opened.append(opener(self.path, again | _DIRECT))
                # What goes through the cache must not bring its neighbours there, which go past it:
                # where both change at once, the system keeps the old bytes of those.
                os.posix_fadvise(opened[0], 0, 0, os.POSIX_FADV_RANDOM)
        except OSError as error:
            if not opened or error.errno not in _NO_DIRECT:
                for descriptor in opened:
                    os.close(descriptor)
                raise FileIOError("cannot open", self.path, error.errno or errno.EIO) from error
            _say_buffered(self.path)
        return opened

    def _begin(self, tensor: torch.Tensor, offset: int, *, writes: bool) -> Request:
        self._check_open()
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            layout = "contiguous" if tensor.is_contiguous() else "not contiguous"
            raise ValueError(
                f"{self.path} takes contiguous tensors in host memory, got one on {tensor.device} "
                f"that is {layout}; copy it first"
            )
        if offset < 0:
            raise ValueError(f"{self.path}: offset must be at least 0, got {offset}")
        transfer = Transfer(
            self._token, writes, tensor.data_ptr(), tensor.nbytes, offset, Faults.next(writes)
        )
        with self._lock:
            while self._under_way and self._under_way[0].done():
                self._failed.append(self._under_way.popleft())
            # An error that was raised holds the frames that it went through, and all they hold.
            self._failed = [request for request in self._failed if request.unheard()]
            request = Request(self, tensor, transfer)
            self._under_way.append(request)
        return request

    def _check_open(self) -> None:
        if not self._descriptors:
            raise ValueError(f"{self.path} is closed")
        if self._process != os.getpid():
            raise ValueError(f"{self.path} was opened before this process was forked; open it anew")

    def _refuse(self, detail: str, what: str, error: OSError) -> NoReturn:
        raise FileIOError(what, self.path, error.errno or errno.EIO, detail) from error


_open_files: weakref.WeakSet[AsyncFile] = weakref.WeakSet()


@atexit.register
def _let_transfers_end() -> None:
    """Memory must not be moved any more while the interpreter frees it."""
    for file in list(_open_files):
        try:
            file.close()
        except FileIOError as error:
            logger.error("%s", error)


def _open_private(path: str, flags: int) -> int:
    return os.open(path, flags, 0o600)


def _say_buffered(path: str) -> None:
    folder = os.path.dirname(os.path.abspath(path))  # noqa: PTH100, PTH120
    say_once(
        f"the file system of {folder} cannot read and write past the page cache (O_DIRECT), so "
        "files there take host memory as well"
    )
