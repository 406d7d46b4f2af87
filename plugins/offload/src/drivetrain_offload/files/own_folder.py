"""A folder that belongs to this user alone, on a disk that others share.

Everything inside is reached from the folder's descriptor, and no link is followed. So another user
who may write in the folder above can plant a link or move things about, but what is made, removed
and given permissions stays inside of folders that this user owns.
"""

from __future__ import annotations

import errno
import fcntl
import os
import stat
from contextlib import suppress
from pathlib import Path

from drivetrain_offload.file_io import FileIOError

_INSIDE = os.O_NOFOLLOW | os.O_CLOEXEC
_FOLDER = os.O_RDONLY | os.O_DIRECTORY | _INSIDE
_PRIVATE = 0o700


class OwnFolder:
    """An open folder of this user.

    Args:
        path: where it is, for messages.
        descriptor: of the folder; closed by :meth:`close`.
    """

    def __init__(self, path: Path, descriptor: int) -> None:
        self.path = path
        self.descriptor = descriptor

    @classmethod
    def below(cls, shared: Path, name: str) -> OwnFolder:
        """Open the folder ``name`` in a folder that others may write in; made if it is not there.

        Raises:
            OSError: it cannot be made or opened.
            FileIOError: what bears the name is a link, or belongs to another user.
        """
        _make_folders(shared)
        above = os.open(shared, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            with suppress(FileExistsError):
                os.mkdir(name, _PRIVATE, dir_fd=above)
            return cls._opened(shared / name, name, above)
        finally:
            os.close(above)

    def make(self, name: str) -> OwnFolder:
        """Make a folder inside.

        Raises:
            OSError: it cannot be made, or exists.
        """
        os.mkdir(name, _PRIVATE, dir_fd=self.descriptor)
        return self._opened(self.path / name, name, self.descriptor)

    def folder(self, name: str) -> OwnFolder:
        """Open a folder inside.

        Raises:
            OSError: it cannot be opened.
            FileIOError: it is a link, or belongs to another user.
        """
        return self._opened(self.path / name, name, self.descriptor)

    def file(self, name: str, flags: int) -> int:
        """A descriptor of a file inside, which is private if ``flags`` make it.

        Raises:
            OSError: it cannot be opened.
            FileIOError: it is no file of this user.
        """
        # O_NONBLOCK, so that a pipe in the file's place is refused and not waited for.
        opened = os.open(name, flags | _INSIDE | os.O_NONBLOCK, 0o600, dir_fd=self.descriptor)
        try:
            facts = os.fstat(opened)
            if not stat.S_ISREG(facts.st_mode) or facts.st_uid != os.geteuid():
                raise FileIOError(
                    "cannot use", self.path / name, errno.EPERM, ", no file of this user"
                )
            # Some file systems have asynchronous requests fail where it stays set.
            fcntl.fcntl(opened, fcntl.F_SETFL, fcntl.fcntl(opened, fcntl.F_GETFL) & ~os.O_NONBLOCK)
        except BaseException:
            os.close(opened)
            raise
        return opened

    def names(self) -> list[str]:
        """What is inside."""
        return os.listdir(self.descriptor)  # noqa: PTH208 - of a descriptor

    def allocated(self, name: str) -> int:
        """Bytes that a file takes on the disk."""
        return os.stat(name, dir_fd=self.descriptor, follow_symlinks=False).st_blocks * 512

    def unlink(self, name: str) -> None:
        """Remove a file, or a link itself, if it is there. A closed folder is left alone."""
        if self.descriptor >= 0:  # its number may be another file's by now
            with suppress(FileNotFoundError):
                os.unlink(name, dir_fd=self.descriptor)

    def rmdir(self, name: str) -> None:
        """Remove an empty folder."""
        os.rmdir(name, dir_fd=self.descriptor)

    def close(self) -> None:
        """Close the descriptor. May be called repeatedly."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    @classmethod
    def _opened(cls, path: Path, name: str, above: int) -> OwnFolder:
        if stat.S_ISLNK(os.stat(name, dir_fd=above, follow_symlinks=False).st_mode):
            raise FileIOError(
                "cannot use", path, errno.ELOOP, ", a link that this job did not make"
            )
        descriptor = os.open(name, _FOLDER, dir_fd=above)
        try:
            facts = os.fstat(descriptor)
            if facts.st_uid != os.geteuid():
                raise FileIOError(
                    "cannot use", path, errno.EPERM, f", a folder of user {facts.st_uid}"
                )
            if stat.S_IMODE(facts.st_mode) != _PRIVATE:
                os.fchmod(descriptor, _PRIVATE)
        except BaseException:
            os.close(descriptor)
            raise
        return cls(path, descriptor)


def _make_folders(path: Path) -> None:
    """Make a folder and those above it; others may not write in them, whatever the umask."""
    if not path.is_dir():
        _make_folders(path.parent)
        with suppress(FileExistsError):
            path.mkdir(mode=0o755)
