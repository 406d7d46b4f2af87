"""The two phases of a save: every rank writes its part, then rank 0 makes the whole appear.

1. A rank writes its tensors, and when they are durable its part of the index: its vote. A rank
   that cannot writes its error instead, if it can.
2. When all have voted, rank 0 merges the parts, finds out whether they are a whole, writes the
   index, and gives the folder its manifest: from that moment on there is the new checkpoint.
   ``latest`` follows, then what is no longer needed is removed.

What fails before the manifest takes back what the save has written, and nothing else. What fails
from then on takes back nothing, and nothing earlier is removed either, since it may be needed.

How the ranks learn that all have voted is up to who carries out the save.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any, TypeVar

import torch

from drivetrain.checkpoint.format import index
from drivetrain.checkpoint.format.retention import Retention, expired, remove_checkpoint
from drivetrain.checkpoint.format.storage import Storage
from drivetrain.checkpoint.format.tensor_file import NAMES, TensorEntry, WrittenFile, write_tensors
from drivetrain.errors import CheckpointError

logger = logging.getLogger("drivetrain.checkpoint")

_PART_LIMIT = 1 << 30
T = TypeVar("T")


class UnfinishedSaveError(CheckpointError):
    """A save that failed when its checkpoint was there already, or may have been."""


@dataclass(frozen=True)
class SavedBox:
    """A tensor in a rank's file.

    Args:
        entry: what is written.
        key: ``kind/name`` of the tensor that it is a box of, or the name of what is the rank's own.
        shape: of the whole tensor; ``None`` for what is the rank's own.
        offset: place of the box in it.
    """

    entry: TensorEntry
    key: str
    shape: tuple[int, ...] | None = None
    offset: tuple[int, ...] = ()


@dataclass
class PendingSave:
    """One rank's part of a save that has been prepared and not yet written.

    Args:
        storage: where the checkpoints of the run lie.
        tag: of this one.
        id: of this save, the same on all ranks.
        rank: this rank.
        world_size: number of ranks.
        boxes: what this rank writes, in order; read when it is written.
        empty: tensors without elements: ``kind/name`` -> (dtype, shape).
        manifest: of the checkpoint, without index; used on rank 0.
        save_latest: whether ``latest`` is to name it.
        retention: what becomes of earlier ones.
    """

    storage: Storage
    tag: str
    id: str
    rank: int
    world_size: int
    boxes: list[SavedBox]
    empty: dict[str, tuple[torch.dtype, tuple[int, ...]]]
    manifest: dict[str, Any]
    save_latest: bool = True
    retention: Retention = field(default_factory=Retention)
    _sealed: bool = False
    """Whether the manifest may name this save."""

    @property
    def place(self) -> str:
        """The checkpoint's folder, for messages."""
        return self.storage.where(self.tag)

    @property
    def nbytes(self) -> int:
        """Bytes of this rank's tensors."""
        return sum(box.entry.nbytes for box in self.boxes)

    def snapshot(self, memory: torch.Tensor) -> None:
        """Copy all tensors, so that what is saved is what there is now.

        Args:
            memory: :attr:`nbytes` bytes of host memory, untouched until the save has ended.
        """
        copied, at = [], 0
        for box in self.boxes:
            entry = box.entry
            place = memory[at : at + entry.nbytes].view(entry.dtype).view(entry.shape)
            place.copy_(entry.read())
            at += entry.nbytes
            copied.append(replace(box, entry=replace(entry, read=place.detach)))
        self.boxes = copied

    # -- phase 1, on every rank -------------------------------------------------------------------

    def write(self) -> None:
        """Write this rank's tensors, and when they are durable its vote.

        Raises:
            OSError: the storage fails.
        """
        with self.storage.writing(self._path(index.data_file(self.rank, self.id))) as sink:
            written = write_tensors(sink, [box.entry for box in self.boxes])
        self._vote(self._part(written))

    def refuse(self, problem: str) -> None:
        """Vote against the save, for ranks that wait for this one's vote.

        Raises:
            OSError: the storage fails.
        """
        self._vote({"error": problem})

    def _vote(self, part: Mapping[str, Any]) -> None:
        data = json.dumps(part, separators=(",", ":")).encode()
        self.storage.put(self._path(index.part_file(self.rank, self.id)), data)

    def _part(self, written: WrittenFile) -> dict[str, Any]:
        tensors: dict[str, Any] = {
            key: _columns(dtype, shape) for key, (dtype, shape) in self.empty.items()
        }
        own: dict[str, Any] = {}
        for box, (at, crc) in zip(self.boxes, written.places, strict=True):
            entry = box.entry
            into = own if box.shape is None else tensors
            shape = entry.shape if box.shape is None else box.shape
            raw = into.setdefault(box.key, _columns(entry.dtype, shape))
            offset = box.offset or (0,) * len(shape)
            row = ([self.rank], [at], offset, entry.shape, [crc])
            for column, values in zip(_COLUMNS, row, strict=True):
                raw[column] += values
        facts = {"bytes": written.nbytes, "header": written.header, "crc": written.checksum}
        return {"tensors": tensors, "rank": {**facts, "own": own}}

    # -- phase 2, on rank 0 -----------------------------------------------------------------------

    def missing_votes(self) -> set[int]:
        """Ranks that have not voted yet."""
        names = set(self.storage.names(self.tag))
        return {r for r in range(self.world_size) if index.part_file(r, self.id) not in names}

    def commit(self) -> None:
        """Make the checkpoint appear; all ranks must have voted.

        Raises:
            CheckpointError: a rank voted against it, or the parts are no whole.
            OSError: the storage fails, and there is no such checkpoint.
            UnfinishedSaveError: the checkpoint is there, or may be; not all is done that follows.
        """
        whole = merge(map(self._read_part, range(self.world_size)))
        data = json.dumps(whole, separators=(",", ":")).encode()
        self.storage.put(self._path(index.index_file(self.id)), data)
        digest = hashlib.sha256(data).hexdigest()
        facts = {"bytes": len(data), "sha256": digest}
        self._seal(index.seal({**self.manifest, "id": self.id, "index": facts}))
        if self.save_latest:
            self._point_latest()
        self._clean()

    def discard(self) -> None:
        """Remove what all ranks have written, unless it is a checkpoint by now, or may be one.

        The checkpoint of that tag, if there is another, stays.
        """
        if self._sealed and self._appeared() is not False:
            return
        for name in self.storage.names(self.tag):
            if index.id_of(name) == self.id:
                self.storage.remove(self._path(name))
        self.storage.remove(self.tag)

    def _seal(self, manifest: bytes) -> None:
        """Write the manifest. An error does not say whether it is there, so look."""
        self._sealed = True
        try:
            self.storage.put(self._path(index.MANIFEST), manifest)
        except Exception as error:
            if (appeared := self._appeared()) is False:
                raise
            state = "is there" if appeared else "may be there"
            raise UnfinishedSaveError(
                f"checkpoint {self.place} {state}, but its storage has not confirmed that it will "
                f"last: {error}; nothing older was removed; save again"
            ) from error

    def _appeared(self) -> bool | None:
        """True if the manifest names this save; ``None`` when it cannot be read."""
        path = self._path(index.MANIFEST)
        try:
            if index.MANIFEST not in self.storage.names(self.tag):
                return False
            data = self.storage.get(path, index.MANIFEST_LIMIT)
            return bool(index.unseal(data, self.storage.where(path)).get("id") == self.id)
        except (CheckpointError, OSError) as error:
            logger.warning("%s", error)
            return None

    def _point_latest(self) -> None:
        try:
            self.storage.put(index.LATEST, self.tag.encode())
        except Exception as error:
            raise UnfinishedSaveError(
                f"checkpoint {self.place} is saved, but {self.storage.where(index.LATEST)} could "
                f"not be written: {error}; nothing older was removed; save again, or load it with "
                f"tag={self.tag!r}"
            ) from error

    def _read_part(self, rank: int) -> dict[str, Any]:
        path = self._path(index.part_file(rank, self.id))
        part = index.parse(self.storage.get(path, _PART_LIMIT), self.storage.where(path))
        if "error" in part:
            raise CheckpointError(f"rank {rank}: {part['error']}")
        return part

    def _clean(self) -> None:
        """Remove votes, an earlier checkpoint of the tag, and expired ones; log what stays."""
        tidy = _Tidy(self.place)
        for name in tidy.do(self.storage.names, self.tag) or ():
            if index.id_of(name) not in (None, self.id) or name.endswith(".part.json"):
                tidy.do(self.storage.remove, self._path(name))
        for tag in tidy.do(expired, self.storage, self.retention, self.tag) or ():
            if tidy.do(remove_checkpoint, self.storage, tag) is not None:
                logger.info("removed checkpoint %s", self.storage.where(tag))
        tidy.report()

    def _path(self, name: str) -> str:
        return f"{self.tag}/{name}"


def merge(parts: Iterable[Mapping[str, Any]]) -> dict[str, Any]:
    """The index made of the ranks' parts.

    Raises:
        CheckpointError: the boxes of a tensor do not make it up.
    """
    tensors: dict[str, Any] = {}
    ranks = []
    for part in parts:
        ranks.append(part["rank"])
        for key, raw in part["tensors"].items():
            whole = tensors.setdefault(key, raw)
            if whole is raw:
                continue
            if (whole["dtype"], whole["shape"]) != (raw["dtype"], raw["shape"]):
                raise CheckpointError(f"ranks differ in dtype or shape of {key}")
            for column in _COLUMNS:
                whole[column] += raw[column]
    for key, raw in tensors.items():
        if _held(raw) != prod(raw["shape"]):
            _drop_copies(key, raw)
        if (held := _held(raw)) != (numel := prod(raw["shape"])):
            raise CheckpointError(
                f"the ranks own {held:,} of the {numel:,} elements of {key}; whoever shards it "
                "must make exactly one rank the owner of each"
            )
    return {"tensors": tensors, "ranks": ranks}


def _held(raw: Mapping[str, Any]) -> int:
    """Elements in all boxes of a tensor."""
    sizes = torch.tensor(raw["size"], dtype=torch.int64)
    return int(sizes.reshape(len(raw["rank"]), len(raw["shape"])).prod(dim=1).sum())


def _drop_copies(key: str, raw: dict[str, Any]) -> None:
    """Keep the first of equal boxes that several ranks wrote, such as update counts."""
    dims, first = len(raw["shape"]), dict[tuple[int, ...], int]()
    for number, crc in enumerate(raw["crc"]):
        place = slice(number * dims, (number + 1) * dims)
        other = first.setdefault((*raw["offset"][place], *raw["size"][place]), number)
        if raw["crc"][other] != crc:
            raise CheckpointError(
                f"ranks {raw['rank'][other]} and {raw['rank'][number]} both own elements of {key}, "
                "with different values"
            )
    raw["offset"] = [x for box in first for x in box[:dims]]
    raw["size"] = [x for box in first for x in box[dims:]]
    for column in ("rank", "at", "crc"):
        raw[column] = [raw[column][number] for number in first.values()]


class _Tidy:
    """Steps of cleaning up, of which each is tried though others fail.

    Args:
        place: the checkpoint that is saved already.
    """

    def __init__(self, place: str) -> None:
        self._place = place
        self._problems: list[str] = []

    def do(self, step: Callable[..., T], *arguments: Any) -> T | None:
        """What ``step`` returns; ``None`` if it failed."""
        try:
            return step(*arguments)
        except (CheckpointError, OSError) as error:
            self._problems.append(str(error))
            return None

    def report(self) -> None:
        """Say what has failed, if anything has."""
        if self._problems:
            logger.error(
                "checkpoint %s is saved, but not all that it replaces could be removed: %s",
                *(self._place, "; ".join(self._problems)),
            )


_COLUMNS = ("rank", "at", "offset", "size", "crc")


def _columns(dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"dtype": NAMES[dtype], "shape": list(shape), **{column: [] for column in _COLUMNS}}
