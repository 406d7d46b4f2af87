"""Opening files that others may have put there: regular files below a folder, or an error."""

from __future__ import annotations

import os
import stat

from drivetrain.errors import CheckpointError

# Without O_BINARY Windows changes the ends of lines.
_READ = os.O_RDONLY | getattr(os, "O_BINARY", 0)
_READ |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0)
# So that a pipe is refused and not waited for.
_AT_ONCE = getattr(os, "O_NONBLOCK", 0)

_HOLES_MATTER = 64 << 20
_FULLEST = 100


def path_below(root: str, path: str, boundary: str | None = None) -> str:
    """The real path of what is called ``path`` below a folder; links are followed.

    Args:
        root: the folder.
        path: below it.
        boundary: a folder above, to allow for links that lead out of ``root`` but not of this one.

    Raises:
        CheckpointError: a link leads elsewhere.
    """
    named = os.path.join(root, path)  # noqa: PTH118 - a string, as all in Storage
    real = os.path.realpath(named)
    bound = os.path.realpath(boundary or root)
    if real != bound and not real.startswith(bound.rstrip(os.sep) + os.sep):
        raise CheckpointError(
            f"{named} leads out of {boundary or root}, to {real}, and is not "
            "followed: copy it, or name the folder that it leads to"
        )
    return real


def open_plain(path: str) -> int:
    """A descriptor for reading a file.

    Raises:
        CheckpointError: it is no regular file, or claims far more than there is on the disk.
        OSError: it cannot be opened.
    """
    descriptor = os.open(path, _READ | _AT_ONCE)
    try:
        _check(path, os.fstat(descriptor))
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _check(path: str, facts: os.stat_result) -> None:
    if not stat.S_ISREG(facts.st_mode):
        raise CheckpointError(f"{path} is no regular file")
    # File systems that do not tell say 0; those that compress do not reach the factor with tensors.
    held = getattr(facts, "st_blocks", 0) * 512
    if facts.st_size > _HOLES_MATTER and 0 < held * _FULLEST < facts.st_size:
        raise CheckpointError(
            f"{path} is damaged: of {facts.st_size:,} bytes the disk holds {held:,}, and holes "
            "between them"
        )
