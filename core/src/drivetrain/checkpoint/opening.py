"""Open the checkpoint that a caller names by a path or URL, and perhaps a tag."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from drivetrain.checkpoint.format.index import LATEST, MANIFEST, Stored
from drivetrain.checkpoint.format.storage import open_storage
from drivetrain.checkpoint.load import check_file
from drivetrain.errors import CheckpointError


@contextmanager
def opened(place: str, tag: str | None = None) -> Iterator[Stored]:
    """A checkpoint, by its own folder, or by its run's folder and a tag.

    Args:
        place: a checkpoint's folder, or that of a run; a path or a URL.
        tag: which of the run's; the one that ``latest`` names by default.

    Raises:
        CheckpointError: there is none, or it is damaged.
    """
    trimmed = place.rstrip("/")
    if "://" not in place and Path(trimmed).is_symlink():  # what is named may be a link
        trimmed = str(Path(trimmed).resolve())
    run, separator, last = trimmed.rpartition("/")
    if tag is None and last and MANIFEST in open_storage(trimmed).names():
        storage, tag = open_storage(run or separator or "."), last
    else:
        storage = open_storage(trimmed)
        if tag is None:
            if storage.size(LATEST) is None:
                raise CheckpointError(
                    f"{place} is no checkpoint, and no folder of checkpoints: it has neither "
                    f"{MANIFEST} nor {LATEST}"
                )
            tag = storage.get(LATEST, 4096).decode(errors="replace").strip()
    try:
        yield Stored(storage, tag)
    finally:
        storage.close()


def check_files(stored: Stored) -> None:
    """Compare length and header of every rank's file with what the index says, before all is read.

    Raises:
        CheckpointError: one is missing or damaged.
    """
    for rank in range(stored.world_size):
        check_file(stored, rank)
