"""The per-user cache of built libraries: checksummed entries that appear in one step.

An entry is a folder ``<name>-<key>`` with the library and its SHA-256. It is built in a private
folder beside it and renamed into place, so a reader sees a whole entry or none, whatever is killed
when. Builders of one key take turns through ``flock``, which the kernel releases with the process;
the lock saves work, correctness does not depend on it.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

from drivetrain.errors import BuildError

LIBRARY = "library.so"
CHECKSUM = "library.sha256"


def cache_root() -> Path:
    """``$DRIVETRAIN_CACHE``, else ``$XDG_CACHE_HOME/drivetrain``, else ``~/.cache/drivetrain``."""
    chosen = os.environ.get("DRIVETRAIN_CACHE")
    if chosen:
        return Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "drivetrain"


def checked(folder: Path) -> Path | None:
    """The library in ``folder``, if it is there and matches its checksum."""
    library = folder / LIBRARY
    try:
        expected = (folder / CHECKSUM).read_text().strip()
        actual = sha256(library)
    except (OSError, UnicodeDecodeError):
        return None
    return library if actual == expected else None


def sha256(file: Path) -> str:
    """Hexadecimal SHA-256 of a file's bytes."""
    return hashlib.sha256(file.read_bytes()).hexdigest()


def obtain(name: str, key: str, build: Callable[[Path, str], None]) -> tuple[Path, bool]:
    """The cached library of ``key``, built if there is no sound one.

    Args:
        name: readable part of the entry's name.
        key: what the binary depends on, hashed.
        build: ``build(folder, file_name)`` compiles into a private folder.

    Returns:
        The library and whether it was built now.

    Raises:
        BuildError: the build failed, or the cache cannot be written.
    """
    root = cache_root() / "kernels"
    entry = root / f"{name}-{key}"
    found = checked(entry)
    if found is not None:
        return found, False
    try:
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
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


def publish(library: Path, entry: Path) -> None:
    """Make ``entry`` hold ``library`` and its checksum, in one step.

    A folder that is in the way is moved aside first if it is not sound; if a sound one appears
    meanwhile (a builder on a file system without locks), that one stays.
    """
    entry.parent.mkdir(parents=True, exist_ok=True)
    staged = Path(tempfile.mkdtemp(dir=entry.parent, prefix=f".{entry.name}-"))
    try:
        shutil.copyfile(library, staged / LIBRARY)
        (staged / CHECKSUM).write_text(sha256(staged / LIBRARY) + "\n")
        _sync(staged / LIBRARY)
        _sync(staged / CHECKSUM)
        if entry.exists() and checked(entry) is None:
            entry.rename(staged / "damaged")
        try:
            # The damaged entry, if any, rides along inside and is removed below.
            staged.rename(entry)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST) or checked(entry) is None:
                raise
        shutil.rmtree(entry / "damaged", ignore_errors=True)
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def _sync(file: Path) -> None:
    """A crash of the machine must not leave a renamed folder with empty files."""
    descriptor = os.open(file, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def _turn(lock: Path) -> Iterator[bool]:
    """Wait until no other process builds this key; ``False`` where files cannot be locked."""
    descriptor = os.open(lock, os.O_RDWR | os.O_CREAT, 0o600)
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
