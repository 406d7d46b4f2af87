"""Which checkpoint a load without a tag takes.

The one that ``latest`` names. Another one only if that is damaged, and then one that it continued
from: a run that went back and took another way has left checkpoints of higher steps, which are no
part of it. So every manifest names the saves before it in its run. Where no manifest tells, or all
of those are damaged, the one that was saved last is taken, but for those that went another way.
Any other choice than the latest is logged as an error.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from dataclasses import dataclass, field
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

from drivetrain.checkpoint.agreement import text_of, worst
from drivetrain.checkpoint.format import index
from drivetrain.checkpoint.format.retention import LATEST_LIMIT
from drivetrain.checkpoint.format.storage import Storage
from drivetrain.errors import CheckpointError

if TYPE_CHECKING:
    from drivetrain.checkpoint.subject import Subject

logger = logging.getLogger("drivetrain.checkpoint")

_LONGEST = 1024
"""Saves that a manifest names; older ones are hardly kept."""

_histories: WeakKeyDictionary[Subject, list[str]] = WeakKeyDictionary()


def history_of(engine: Subject) -> list[str]:
    """Ids of the saves that an engine's state continues from, the newest last."""
    return _histories.get(engine, [])[-_LONGEST:]


def continue_history(engine: Subject, before: list[str], save_id: str) -> None:
    """Note that an engine's state is that of a save, and the saves before it."""
    _histories[engine] = [*before[-_LONGEST:], save_id]


@dataclass(frozen=True)
class Known:
    """What the manifest of a checkpoint says.

    Args:
        tag: its folder.
        id: of its save.
        step: of the run.
        saved_at: when its save began.
        meant: whether ``latest`` was to name it.
        history: ids of the saves before it in its run; ``None`` when that was not written.
    """

    tag: str
    id: str
    step: int
    saved_at: datetime
    meant: bool
    history: list[str] | None

    def __str__(self) -> str:
        return f"{self.tag} (step {self.step}, saved at {self.saved_at:%Y-%m-%d %H:%M:%S} UTC)"

    @classmethod
    def of(cls, tag: str, manifest: dict[str, Any]) -> Known:
        """What ``manifest`` says.

        Raises:
            LookupError, TypeError, ValueError, ArithmeticError: it is malformed.
        """
        saved_at = datetime.fromisoformat(manifest["saved_at"]).astimezone(UTC)
        meant, history = bool(manifest.get("latest", True)), manifest.get("history")
        known = history if isinstance(history, list) else None
        return cls(tag, manifest["id"], int(manifest["step"]), saved_at, meant, known)


@dataclass
class _Folder:
    """All checkpoints of a run, the newest first, and what could not be read for now."""

    known: list[Known] = field(default_factory=list)
    unreadable: list[str] = field(default_factory=list)

    @classmethod
    def of(cls, storage: Storage) -> _Folder:
        folder = cls()
        for tag in filter(index.is_plain_name, storage.names()):
            path = f"{tag}/{index.MANIFEST}"
            try:
                if storage.size(path) is not None:
                    data = storage.get(path, index.MANIFEST_LIMIT)
                    folder.known.append(Known.of(tag, index.unseal(data, storage.where(path))))
            except OSError as error:
                folder.unreadable.append(f"{storage.where(path)}: {error}")
            except (CheckpointError, LookupError, TypeError, ValueError, ArithmeticError) as error:
                logger.warning("checkpoint %s counts as none: %s", storage.where(tag), error)
        folder.known.sort(key=lambda known: (known.saved_at, known.step), reverse=True)
        return folder

    def instead_of(self, damaged: Known | None) -> Iterator[Known]:
        """What may be taken in place of a damaged one, best first.

        Raises:
            CheckpointError: not all manifests could be read, so that the best is not known.
        """
        if self.unreadable:
            raise CheckpointError(
                f"another checkpoint is not chosen while some cannot be read: {self.unreadable[0]}"
            )
        past = set((damaged and damaged.history) or ())
        yield from (known for known in self.known if known.id in past)
        for known in self.known:
            shared = past & {known.id, *(known.history or ())}  # then it went another way
            if known.meant and known != damaged and not shared:
                yield known


def tags_by_age(storage: Storage) -> list[str]:
    """Tags of checkpoints with a readable manifest, the newest first."""
    return [known.tag for known in _Folder.of(storage).known]


def candidates(engine: Subject, storage: Storage) -> Iterator[str]:
    """Tags to be tried one after the other; rank 0's view counts. Collective.

    Raises:
        CheckpointError: on every rank, when it cannot be told which one is right.
    """
    own = _ordered(storage) if engine.job.rank == 0 else iter(())
    while True:
        tag, problem = "", None
        try:
            tag = next(own, "")
        except (CheckpointError, OSError) as error:
            problem = str(error)
        if (found := worst(engine.job, problem)) is not None:
            raise CheckpointError(found)
        if not (agreed := text_of(engine.job, 0, tag)):
            return
        yield agreed


def _ordered(storage: Storage) -> Iterator[str]:
    place, pointer = storage.where(index.LATEST), _pointer(storage)
    folder = _Folder.of(storage)
    if pointer is None:
        meant = [known for known in folder.known if known.meant]
        if meant:
            logger.error("%s is missing; the checkpoint that was saved last is tried", place)
            yield from (known.tag for known in folder.instead_of(None))
        elif folder.known:
            logger.warning(
                "none of the checkpoints beside %s was saved as the latest; load one with tag=%r",
                *(place, folder.known[0].tag),
            )
        return
    first = next((known for known in folder.known if known.tag == pointer), None)
    if first is not None:
        _warn_of_newer(first, folder.known, place)
    yield pointer
    yield from (known.tag for known in folder.instead_of(first))


def _pointer(storage: Storage) -> str | None:
    """The tag in ``latest``; ``"?"``, which names nothing, when that is damaged."""
    if storage.size(index.LATEST) is None:
        return None
    try:
        data = storage.get(index.LATEST, LATEST_LIMIT)
    except CheckpointError as error:
        logger.error("%s", error)
        return "?"
    return data.decode(errors="replace").strip() or "?"


def _warn_of_newer(first: Known, known: list[Known], place: str) -> None:
    """Say that ``latest`` may be out of date, or damaged, or was changed by hand."""
    before = first.history or ()
    newer = [k for k in known if k.meant and k.saved_at > first.saved_at and k.id not in before]
    if newer:
        logger.error(
            "%s names %s, but %s was saved later: the one that it names is loaded; for the other "
            "pass tag=%r",
            *(place, first, newer[0], newer[0].tag),
        )
