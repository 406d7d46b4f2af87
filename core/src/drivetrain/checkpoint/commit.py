"""The two phases of a save: every rank writes its part, then rank 0 makes the whole appear.

1. A rank writes its tensors, and when they are durable its part of the index: its vote. A rank
   that cannot writes its error instead, if it can.
2. When all have voted, rank 0 merges the parts, finds out whether they are a whole, writes the
   index, and gives the folder its manifest: from that moment on there is the new checkpoint.
   ``latest`` follows, then what is no longer needed is removed.

How the ranks learn that all have voted is up to who carries out the save.
"""

from __future__ import annotations

import hashlib
import json
import logging
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from math import prod
from typing import Any

import torch

from drivetrain.checkpoint import index
from drivetrain.checkpoint.storage import Storage
from drivetrain.checkpoint.tensor_file import NAMES, TensorEntry, WrittenFile, write_tensors
from drivetrain.errors import CheckpointError

logger = logging.getLogger("drivetrain.checkpoint")

_PART_LIMIT = 1 << 30
_DEFAULT_TAG = re.compile(r"global_step(\d+)")


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


@dataclass(frozen=True)
class Retention:
    """Which checkpoints with default tags stay when a new one is there.

    Args:
        keep_last: the newest so many; ``None`` for all.
        keep_every: and those whose step is a multiple of this.
    """

    keep_last: int | None = None
    keep_every: int | None = None

    def expired(self, tags: Sequence[str], newest: str) -> list[str]:
        """Those of ``tags`` that go; ``newest`` stays."""
        steps = {tag: int(found[1]) for tag in tags if (found := _DEFAULT_TAG.fullmatch(tag))}
        if self.keep_last is None or newest not in steps:
            return []
        older = sorted((s, tag) for tag, s in steps.items() if s < steps[newest])
        doomed = older[: max(0, len(older) + 1 - self.keep_last)]
        return [t for s, t in doomed if self.keep_every is None or s % self.keep_every]


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
        sink = self.storage.create(self._path(index.data_file(self.rank, self.id)))
        written = write_tensors(sink, [box.entry for box in self.boxes])
        sink.close()
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

    def missing_votes(self) -> int:
        """How many ranks have not voted yet."""
        names = set(self.storage.names(self.tag))
        return sum(index.part_file(r, self.id) not in names for r in range(self.world_size))

    def commit(self) -> None:
        """Make the checkpoint appear; all ranks must have voted.

        Raises:
            CheckpointError: a rank voted against it, or the parts are no whole.
            OSError: the storage fails. The checkpoint exists then if its manifest does.
        """
        whole = merge(map(self._read_part, range(self.world_size)))
        data = json.dumps(whole, separators=(",", ":")).encode()
        self.storage.put(self._path(index.index_file(self.id)), data)
        digest = hashlib.sha256(data).hexdigest()
        facts = {"bytes": len(data), "sha256": digest}
        manifest = index.seal({**self.manifest, "id": self.id, "index": facts})
        self.storage.put(self._path(index.MANIFEST), manifest)
        if self.save_latest:
            self.storage.put(index.LATEST, self.tag.encode())
        self._clean()

    def discard(self) -> None:
        """Remove what all ranks have written; the checkpoint of that tag, if any, stays."""
        for name in self.storage.names(self.tag):
            if index.id_of(name) == self.id:
                self.storage.remove(self._path(name))
        self.storage.remove(self.tag)

    def _read_part(self, rank: int) -> dict[str, Any]:
        path = self._path(index.part_file(rank, self.id))
        part = index.parse(self.storage.get(path, _PART_LIMIT), self.storage.where(path))
        if "error" in part:
            raise CheckpointError(f"rank {rank}: {part['error']}")
        return part

    def _clean(self) -> None:
        """Remove votes, an earlier checkpoint of the tag, and expired ones."""
        for name in self.storage.names(self.tag):
            if index.id_of(name) not in (None, self.id) or name.endswith(".part.json"):
                self.storage.remove(self._path(name))
        for tag in self.retention.expired(self.storage.names(), self.tag):
            remove_checkpoint(self.storage, tag)
            logger.info("removed checkpoint %s", self.storage.where(tag))

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


def remove_checkpoint(storage: Storage, tag: str) -> None:
    """Remove a checkpoint, its manifest first, so that a half removed one is none."""
    names = storage.names(tag)
    ours = [name for name in names if index.id_of(name) is not None]
    for name in [index.MANIFEST] * (index.MANIFEST in names) + ours:
        storage.remove(f"{tag}/{name}")
    storage.remove(tag)


_COLUMNS = ("rank", "at", "offset", "size", "crc")


def _columns(dtype: torch.dtype, shape: tuple[int, ...]) -> dict[str, Any]:
    return {"dtype": NAMES[dtype], "shape": list(shape), **{column: [] for column in _COLUMNS}}
