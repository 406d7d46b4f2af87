"""The per-user cache of built libraries: checksummed entries that appear in one step.

An entry is a folder ``<name>-<key>`` with the library and its SHA-256. It is built in a private
folder beside it and renamed into place, so a reader sees a whole entry or none, whatever is killed
when. Builders of one key take turns through ``flock``, which the kernel releases with the process;
the lock saves work, correctness does not depend on it.

The checksum finds damage. What keeps others from having their code loaded is :mod:`trust`: they may
write neither the cache nor a folder on the way to it. All that is made there is this user's alone.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import logging
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from drivetrain.errors import BuildError
from drivetrain_kernels.native.trust import check_entry, read_file, trusted_folder, write_private

logger = logging.getLogger("drivetrain.kernels")

LIBRARY = "library.so"
CHECKSUM = "library.sha256"


def cache_root() -> Path:
    """``$DRIVETRAIN_CACHE``, else ``$XDG_CACHE_HOME/drivetrain``, else ``~/.cache/drivetrain``."""
    chosen = os.environ.get("DRIVETRAIN_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "drivetrain"


def checked(folder: Path, *, trusted: bool = True) -> Path | None:
    """The library in ``folder``, if it is there and matches its checksum.

    Args:
        folder: an entry of the cache, or of a wheel.
        trusted: whether only this user and root may be able to change it. What is installed as a
            part of a package is trusted as the package is.
    """
    library = folder / LIBRARY
    try:
        if trusted:
            check_entry(folder, folder.lstat())
        expected = read_file(folder / CHECKSUM, trusted=trusted).decode().strip()
        actual = _sha256(read_file(library, trusted=trusted))
    except BuildError as error:
        logger.warning("%s; it is built again", error)
        return None
    except (OSError, UnicodeDecodeError):
        return None
    return library if actual == expected else None


def _sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def obtain(name: str, key: str, build: Callable[[Path, str], None]) -> tuple[Path, bool]:
    """The cached library of ``key``, built if there is no sound one.

    Args:
        name: readable part of the entry's name.
        key: what the binary depends on, hashed.
        build: ``build(folder, file_name)`` compiles into a private folder.

    Returns:
        The library and whether it was built now.

    Raises:
        BuildError: the build failed, or the cache cannot be written, or others can change it.
    """
    root = cache_root() / "kernels"
    try:
        root = trusted_folder(root)
        entry = root / f"{name}-{key}"
        found = checked(entry)
        if found is not None:
            return found, False
        with _turn(root / f"{entry.name}.lock") as alone:
            found = checked(entry)
            if found is not None:
                return found, False
            if alone:
                _remove_leftovers(root, entry.name)
            return _build_into(entry, build), True
    except OSError as error:
        raise BuildError(
            f"the kernel cache {root} cannot be written: {error}; point DRIVETRAIN_CACHE elsewhere"
        ) from error


def _build_into(entry: Path, build: Callable[[Path, str], None]) -> Path:
    private = Path(tempfile.mkdtemp(dir=entry.parent, prefix=f".{entry.name}-"))
    try:
        build(private, LIBRARY)
        publish(private / LIBRARY, entry)
    finally:
        shutil.rmtree(private, ignore_errors=True)
    return entry / LIBRARY


def publish(library: Path, entry: Path, *, shipped: bool = False) -> None:
    """Make ``entry`` hold ``library`` and its checksum, in one step.

    A folder that is in the way is moved aside first if it is not sound; if a sound one appears
    meanwhile (a builder on a file system without locks), that one stays.

    Args:
        library: the file.
        entry: where it is to be.
        shipped: whether it is part of a package, which all users may read, or of this user's cache.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=entry.parent, prefix=f".{entry.name}-"))
    try:
        data, mode = library.read_bytes(), 0o644 if shipped else 0o600
        write_private(staged / LIBRARY, data, mode)
        write_private(staged / CHECKSUM, f"{_sha256(data)}\n".encode(), mode)
        staged.chmod(0o755 if shipped else 0o700)
        if os.path.lexists(entry) and checked(entry, trusted=not shipped) is None:
            entry.rename(staged / "damaged")
        try:
            # The damaged entry, if any, rides along inside and is removed below.
            staged.rename(entry)
        except OSError as error:
            sound = checked(entry, trusted=not shipped) is not None
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or not sound:
                raise
        _clear(entry / "damaged")
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _clear(path: Path) -> None:
    """Remove whatever was in the way; of a link only the link."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    else:
        shutil.rmtree(path, ignore_errors=True)


@contextlib.contextmanager
def _turn(lock: Path) -> Iterator[bool]:
    """Wait until no other process builds this key; ``False`` where files cannot be locked."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX)
            alone = True
        except OSError:
            alone = False
        yield alone
    finally:
        os.close(descriptor)


def _remove_leftovers(root: Path, name: str) -> None:
    """Remove private folders of killed builders: who holds the lock knows that they are dead."""
    for folder in root.glob(f".{name}-*"):
        shutil.rmtree(folder, ignore_errors=True)
