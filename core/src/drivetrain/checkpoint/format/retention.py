"""Which checkpoints go when a new one is there, and how one is removed."""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass

from drivetrain.checkpoint.format import index
from drivetrain.checkpoint.format.storage import Storage
from drivetrain.errors import CheckpointError

logger = logging.getLogger("drivetrain.checkpoint")

LATEST_LIMIT = 4096
"""Bytes of the largest ``latest``."""

_DEFAULT_TAG = re.compile(r"global_step(\d+)")


@dataclass(frozen=True)
class Retention:
    """Which checkpoints with default tags stay when a new one is there.

    Args:
        keep_last: the newest so many; ``None`` for all.
        keep_every: and those whose step is a multiple of this.
    """

    keep_last: int | None = None
    keep_every: int | None = None

    def expired(self, tags: Sequence[str], newest: str, torn: Collection[str] = ()) -> list[str]:
        """Those of ``tags`` that go; ``newest`` stays.

        Args:
            tags: of all checkpoints, and what failed saves have left.
            newest: tag of the checkpoint that is there now.
            torn: which of ``tags`` are no checkpoints. They do not count, and go when they are
                older than all that stays.
        """
        steps = {tag: int(found[1]) for tag in tags if (found := _DEFAULT_TAG.fullmatch(tag))}
        if self.keep_last is None or newest not in steps:
            return []
        older = sorted((s, tag) for tag, s in steps.items() if s < steps[newest])
        whole = [(s, tag) for s, tag in older if tag not in torn]
        doomed = whole[: max(0, len(whole) + 1 - self.keep_last)]
        oldest = min(s for s, _ in [*whole[len(doomed) :], (steps[newest], newest)])
        gone = [t for s, t in doomed if self.keep_every is None or s % self.keep_every]
        return [t for s, t in older if t in gone or (t in torn and s < oldest)]


def expired(storage: Storage, retention: Retention, newest: str) -> list[str]:
    """Tags that go now that ``newest`` is there; what ``latest`` names stays.

    Raises:
        CheckpointError, OSError: it is not known what ``latest`` names, or what there is.
    """
    if retention.keep_last is None:
        return []
    named = ""
    if storage.size(index.LATEST) is not None:
        named = storage.get(index.LATEST, LATEST_LIMIT).decode(errors="replace").strip()
    tags = [tag for tag in storage.names() if _DEFAULT_TAG.fullmatch(tag)]
    states = {tag: is_whole(storage, tag) for tag in tags}
    known = [tag for tag, whole in states.items() if whole is not None]
    torn = [tag for tag in known if not states[tag]]
    return [tag for tag in retention.expired(known, newest, torn) if tag != named]


def is_whole(storage: Storage, tag: str) -> bool | None:
    """True for a checkpoint that has all its files, false for what a failed save has left.

    ``None`` for what nobody but its owner may remove: links, folders of others, and checkpoints
    that cannot be read or lack files.
    """
    names = () if storage.is_link(tag) else storage.names(tag)
    if index.MANIFEST not in names:
        return False if any(map(index.id_of, names)) else None
    path = f"{tag}/{index.MANIFEST}"
    try:
        manifest = index.unseal(storage.get(path, index.MANIFEST_LIMIT), storage.where(path))
        save_id, ranks = manifest["id"], range(manifest["world_size"])
    except (CheckpointError, OSError, KeyError, TypeError) as error:
        logger.warning("checkpoint %s counts as none: %s", storage.where(tag), error)
        return None
    if len(ranks) >= len(names):
        return None
    files = {index.index_file(save_id), *(index.data_file(rank, save_id) for rank in ranks)}
    return True if files <= set(names) else None


def remove_checkpoint(storage: Storage, tag: str) -> str:
    """Remove a checkpoint, its manifest first, so that a half removed one is none.

    Returns:
        The tag.
    """
    names = storage.names(tag)
    ours = [name for name in names if index.id_of(name) is not None]
    aside = f"{index.MANIFEST}.new"  # of a save that was killed
    for name in [n for n in (index.MANIFEST, aside) if n in names] + ours:
        storage.remove(f"{tag}/{name}")
    storage.remove(tag)
    return tag
