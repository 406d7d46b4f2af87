"""What goes wrong with files, and what to do about it."""

from __future__ import annotations

import errno
import os

from drivetrain.errors import DrivetrainError

END_OF_FILE = -1
"""``kEndOfFile`` of engine.h: a read reaches beyond the end of the file."""

_FULL = "free space on its file system, or choose another folder"
_ADVICE = {
    errno.EACCES: "check who owns it and its permissions",
    errno.EBADF: "open it for what it is to do: mode 'r' only reads",
    errno.EDQUOT: "the user's quota is used up: free space, or choose another folder",
    errno.EFBIG: "the file is larger than the file system or `ulimit -f` allows",
    errno.EIO: "the device or its connection fails: see the kernel's log, choose another disk",
    errno.ELOOP: "remove the link, or choose another folder",
    errno.EMFILE: "raise the limit on open files, see `ulimit -n`",
    errno.ENODEV: "the device is gone: mount it again, or choose another folder",
    errno.ENOENT: "check that the folder still exists and is mounted",
    errno.ENOSPC: _FULL,
    errno.EPERM: "check who owns it, or choose another folder",
    errno.EROFS: "mount it for writing, or choose another folder",
    errno.ESTALE: "the file server has lost the file: mount it again",
}


class FileIOError(DrivetrainError):
    """A file that cannot be opened, read or written.

    Args:
        what: what failed, e.g. ``"cannot open"``.
        path: the file.
        code: the system's ``errno``, or :data:`END_OF_FILE`.
        detail: what stands between the path and the reason.
    """

    def __init__(
        self, what: str, path: str | os.PathLike[str], code: int, detail: str = ""
    ) -> None:
        self.path = os.fspath(path)
        self.errno = None if code == END_OF_FILE else code
        super().__init__(f"{what} {self.path}{detail}: {_reason(self.path, code)}")


def _reason(path: str, code: int) -> str:
    if code == END_OF_FILE:
        try:
            size = f"the file ends at byte {os.stat(path).st_size}"  # noqa: PTH116
        except OSError:
            size = "the file ends before"
        return f"{size}; it was truncated, or never written so far"
    name = errno.errorcode.get(code, str(code))
    advice = _ADVICE.get(code)
    return f"{os.strerror(code)} ({name})" + (f"; {advice}" if advice else "")
