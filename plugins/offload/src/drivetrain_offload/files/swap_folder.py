"""The folder of one rank's files under ``nvme_path``, and what becomes of those of killed jobs.

Under ``<nvme_path>/drivetrain-<uid>``, which is the user's alone, each rank of each job makes a
folder of its own and holds a lock on a file in it. The system releases the lock with the process,
however that ends, so a folder whose lock can be had belonged to a job that was killed; the next job
that starts removes it. Folders come and go under one more lock, on ``lock`` in the user's folder,
so that none is taken for abandoned before its owner has locked it.
"""

from __future__ import annotations

import atexit
import errno
import fcntl
import logging
import os
import re
import secrets
import socket
import weakref
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING

from drivetrain_offload.file_io import AsyncFile, FileIOError
from drivetrain_offload.files.own_folder import OwnFolder

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_offload.section import Aio

logger = logging.getLogger("drivetrain.offload")

LOCK = "lock"
SUFFIX = ".swap"
_OURS = re.compile(r"[\w.-]+-pid\d+-rank\d+-\w+")
_NO_LOCKS = (errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS)


class SwapFolder:
    """Files of one rank, which disappear with it.

    Args:
        root: ``nvme_path``; made if it is not there.
        rank: part of the folder's name.

    Raises:
        FileIOError: the folder cannot be made.
    """

    def __init__(self, root: str | os.PathLike[str], rank: int = 0) -> None:
        self._numbers = count()
        self._before_close: list[Callable[[], object]] = []
        self._files: weakref.WeakSet[AsyncFile] = weakref.WeakSet()
        self._process = os.getpid()
        name = f"{socket.gethostname()}-pid{os.getpid()}-rank{rank}-{secrets.token_hex(4)}"
        try:
            with ExitStack() as undo:
                ours = OwnFolder.below(Path(root), f"drivetrain-{os.geteuid()}")
                undo.callback(ours.close)
                with _locked(ours):
                    _reclaim(ours)
                    folder = ours.make(name)
                    undo.callback(folder.close)
                    self._lock = folder.file(LOCK, os.O_RDWR | os.O_CREAT)
                    _try_lock(self._lock)
                undo.pop_all()
        except OSError as error:
            raise FileIOError("cannot make a folder in", root, error.errno or errno.EIO) from error
        self._ours, self._folder = ours, folder
        self.path = self._folder.path
        # Also for jobs that nobody closes.
        self._end = weakref.finalize(self, _end, self._ours, self._folder, self._lock, os.getpid())
        _folders.add(self)

    @classmethod
    def of(cls, job: Job, root: str) -> SwapFolder:
        """The folder of ``job`` under ``root``, made on demand and removed when the job closes."""
        folders = _of_jobs.setdefault(job, {})
        if root not in folders:
            folders[root] = cls(root, job.rank)
            job.on_close(folders[root].close)
        return folders[root]

    def create(self, name: str, aio: Aio) -> AsyncFile:
        """A new file, which is removed once the object returned for it is gone.

        Args:
            name: for those who look into the folder.
            aio: how it is read and written.

        Raises:
            FileIOError: it cannot be made.
        """
        readable = re.sub(r"[^\w.-]", "_", name)[:100]
        own, folder = f"{next(self._numbers)}-{readable}{SUFFIX}", self._folder
        file = AsyncFile(
            self.path / own,
            mode="x",
            opener=lambda _, flags: folder.file(own, flags),
            **aio.model_dump(exclude={"use_gds"}),
        )
        weakref.finalize(file, _unlink, folder, own, os.getpid())
        self._files.add(file)
        return file

    def free_bytes(self) -> int:
        """What the disk has left for this user."""
        left = os.fstatvfs(self._folder.descriptor)
        return left.f_bavail * left.f_frsize

    def before_close(self, end: Callable[[], object]) -> None:
        """Have ``end`` called before the files are closed, also by a process that just ends."""
        self._before_close.append(end)

    def close(self) -> None:
        """Wait for what is under way and remove everything. May be called repeatedly."""
        if self._process == os.getpid():
            while self._before_close:
                self._before_close.pop()()
            for file in list(self._files):
                try:
                    file.close()
                except FileIOError as error:
                    logger.error("%s", error)
        self._end()

    def let_go_in_child(self) -> None:
        """A forked process must not keep the lock when its parent is gone."""
        os.close(self._lock)
        self._folder.close()
        self._ours.close()
        self._end.detach()


def new_file(folder: SwapFolder | None, name: str, nbytes: int, aio: Aio) -> AsyncFile | None:
    """A new file of so many bytes, whose space is reserved; None without a folder.

    Raises:
        FileIOError: it cannot be made.
    """
    if folder is None:
        return None
    file = folder.create(name, aio)
    file.preallocate(nbytes)
    return file


_folders: weakref.WeakSet[SwapFolder] = weakref.WeakSet()
_of_jobs: weakref.WeakKeyDictionary[Job, dict[str, SwapFolder]] = weakref.WeakKeyDictionary()


@atexit.register
def _close_all() -> None:
    for folder in list(_folders):
        folder.close()


def _let_go() -> None:
    for folder in list(_folders):
        folder.let_go_in_child()
    _folders.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def _locked(ours: OwnFolder) -> Iterator[None]:
    """Alone, among all processes of this user, where the file system has locks."""
    descriptor = ours.file(LOCK, os.O_RDWR | os.O_CREAT)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        except OSError as error:
            if error.errno not in _NO_LOCKS:
                raise
        yield
    finally:
        os.close(descriptor)


def _try_lock(descriptor: int) -> bool:
    """Lock a file if no process has; ``False`` also where the file system has no locks."""
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in (errno.EWOULDBLOCK, *_NO_LOCKS):
            raise
        return False
    return True


def _reclaim(ours: OwnFolder) -> None:
    """Remove the folders of processes that are gone."""
    for name in filter(_OURS.fullmatch, ours.names()):
        try:
            folder = ours.folder(name)
        except (OSError, FileIOError):  # no folder of ours, or its owner is removing it
            continue
        try:
            lock = folder.file(LOCK, os.O_RDWR | os.O_CREAT)
        except (OSError, FileIOError):
            folder.close()
            continue
        if _try_lock(lock):
            size = sum(folder.allocated(file) for file in folder.names() if file.endswith(SUFFIX))
            logger.warning(
                "removing %s, %s bytes of a job that was killed", folder.path, f"{size:,}"
            )
            _remove(ours, folder)
        os.close(lock)
        folder.close()


def _end(ours: OwnFolder, folder: OwnFolder, lock: int, process: int) -> None:
    """Remove the folder of a rank whose job is over."""
    if process != os.getpid():
        return
    _remove(ours, folder)
    os.close(lock)
    folder.close()
    ours.close()


def _remove(ours: OwnFolder, folder: OwnFolder) -> None:
    """Remove what this module has made in a folder, and the folder if that is all."""
    with suppress(OSError):
        for name in folder.names():
            if name.endswith(SUFFIX):
                folder.unlink(name)
        folder.unlink(LOCK)
        ours.rmdir(folder.path.name)


def _unlink(folder: OwnFolder, name: str, process: int) -> None:
    if process == os.getpid():
        with suppress(OSError):  # its folder may be gone
            folder.unlink(name)
