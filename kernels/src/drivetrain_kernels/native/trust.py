"""What may be loaded as code: files that nobody but this user and the system can change.

A file is trusted if it belongs to this user or to root and others may not write it, and if the same
holds for the folder that it lies in and for all folders on the way there, links included. A folder
above may be open to all if its sticky bit is set, as that of ``/tmp`` is: there everybody moves and
removes only what is his own.
"""

from __future__ import annotations

import os
import stat
from contextlib import suppress
from functools import cache
from pathlib import Path

from drivetrain.errors import BuildError

_MOST_LINKS = 40
_OTHERS_WRITE = stat.S_IWGRP | stat.S_IWOTH


def trusted_folder(path: Path, variable: str = "DRIVETRAIN_CACHE") -> Path:
    """The real path of a folder that code may be loaded from; what is missing is made, for this
    user alone.

    Args:
        path: the folder.
        variable: what sets it, for messages.

    Raises:
        BuildError: somebody else can change what is in it; names the folder or link at fault.
        OSError: it cannot be made, or is no folder.
    """
    at, rest, links = Path("/"), list(reversed((Path.cwd() / path).parts[1:])), 0
    _check_above(at, at.lstat(), variable)
    while rest:
        name = rest.pop()
        if name == "..":
            at = at.parent
            continue
        entry = at / name
        facts = _made(entry)
        if stat.S_ISLNK(facts.st_mode):
            _check_owner(entry, facts, _above(), variable)
            links += 1
            if links > _MOST_LINKS:
                raise BuildError(f"{path} leads through more than {_MOST_LINKS} links")
            target = entry.readlink()
            at = Path("/") if target.is_absolute() else at
            rest += reversed(target.parts[target.is_absolute() :])
            continue
        if not stat.S_ISDIR(facts.st_mode):
            raise NotADirectoryError(f"{entry} is no folder")
        _check_above(entry, facts, variable)
        at = entry
    check_entry(at, at.lstat(), variable)
    return at


def read_file(path: Path, *, trusted: bool) -> bytes:
    """The bytes of a regular file.

    Args:
        path: of the file.
        trusted: whether it is to be one that only this user and root can change.

    Raises:
        BuildError: it is not to be trusted.
        OSError: it cannot be read.
    """
    # O_NONBLOCK, so that a pipe is refused and not waited for.
    descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    with os.fdopen(descriptor, "rb") as file:
        facts = os.fstat(descriptor)
        if not stat.S_ISREG(facts.st_mode):
            raise OSError(f"{path} is no regular file")
        if trusted:
            check_entry(path, facts)
        return file.read()


def check_entry(path: Path, facts: os.stat_result, variable: str = "DRIVETRAIN_CACHE") -> None:
    """Make sure that a file, or what is in a folder, can be changed by this user and root only.

    Raises:
        BuildError: others can.
    """
    _check_owner(path, facts, _ours(), variable)
    if _loose(facts):
        raise BuildError(
            f"{path} may be written by others, so code is not loaded from there: remove it, or "
            f"point {variable} to a folder of your own"
        )


def write_private(path: Path, data: bytes, mode: int = 0o600) -> None:
    """Make a file that is on the disk when this returns, with ``mode`` whatever the umask."""
    flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
    with os.fdopen(os.open(path, flags, 0o600), "wb") as file:
        file.write(data)
        file.flush()
        os.fchmod(file.fileno(), mode)
        os.fsync(file.fileno())


def _made(entry: Path) -> os.stat_result:
    with suppress(FileNotFoundError):
        return entry.lstat()
    with suppress(FileExistsError):  # another process was faster
        entry.mkdir(mode=0o700)
    return entry.lstat()


def _check_above(path: Path, facts: os.stat_result, variable: str) -> None:
    _check_owner(path, facts, _above(), variable)
    if _loose(facts) and not facts.st_mode & stat.S_ISVTX:
        raise BuildError(
            f"{path} may be written by others, so code is not loaded from below it: "
            f"chmod go-w {path}, or point {variable} to a folder of your own"
        )


def _check_owner(path: Path, facts: os.stat_result, trusted: frozenset[int], variable: str) -> None:
    if facts.st_uid not in trusted:
        raise BuildError(
            f"{path} belongs to user {facts.st_uid}, so code is not loaded from there: point "
            f"{variable} to a folder of your own"
        )


def _loose(facts: os.stat_result) -> bool:
    """Whether others may write; the members of a private group are no others."""
    others = _OTHERS_WRITE & ~(stat.S_IWGRP if _is_private_group(facts.st_gid) else 0)
    return bool(facts.st_mode & others)


@cache
def _is_private_group(number: int) -> bool:
    """Whether a group is there for this user alone, as many systems give each user one.

    They let the group write what a user makes, so its mode says nothing about others.
    """
    import grp
    import pwd

    try:
        group, user = grp.getgrgid(number), pwd.getpwuid(os.geteuid())
    except KeyError:
        return False
    alone = not set(group.gr_mem) - {user.pw_name}
    return alone and user.pw_uid != 0 and number == user.pw_gid and group.gr_name == user.pw_name


def _ours() -> frozenset[int]:
    return frozenset({0, os.geteuid()})


def _above() -> frozenset[int]:
    """Whose folders may lie above ours.

    In a container whose users have no numbers outside, the machine's own folders belong to the
    number that stands for all others.
    """
    return _ours() | _unmapped()


@cache
def _unmapped() -> frozenset[int]:
    with suppress(OSError, ValueError):
        other = int(Path("/proc/sys/kernel/overflowuid").read_text())
        lines = Path("/proc/self/uid_map").read_text().splitlines()
        ranges = [map(int, line.split()) for line in lines]
        if not any(first <= other < first + count for first, _, count in ranges):
            return frozenset({other})
    return frozenset()
