"""What a checkpoint holds, and where: the manifest, the index, and how both are checked.

A checkpoint is the folder ``<tag>/`` with

- ``manifest.json``: counters, schedules, client state, layout, and the size and SHA-256 of
- ``index-<id>.json``: for every tensor its dtype, shape and boxes; for every box the rank whose
  file holds it, where in that file, and its checksums; for every rank what is its own;
- ``rank00000-<id>.safetensors``, one per rank.

``<id>`` differs between any two saves. A folder is a checkpoint from the moment on that it has a
manifest, which appears in one step; a save under a tag that exists leaves the old files alone until
then. File names are made of ranks and ids, never read from a file.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod
from typing import Any

import torch

from drivetrain.checkpoint.format.boxes import Boxes, covers_once
from drivetrain.checkpoint.format.storage import Storage
from drivetrain.checkpoint.format.tensor_file import BLOCK, DTYPES
from drivetrain.errors import CheckpointError

FORMAT = "drivetrain-checkpoint-2"
MANIFEST = "manifest.json"
LATEST = "latest"

MANIFEST_LIMIT = 1 << 28
_INDEX_LIMIT = 1 << 32
_HEADER_LIMIT = 100_000_000  # the limit of safetensors
_MANIFEST_SHAPE: dict[str, type] = {
    **dict.fromkeys(("world_size", "step"), int),
    **dict.fromkeys(("id", "saved_at"), str),
    **dict.fromkeys(("index", "state", "client_state", "guarantee", "axes", "versions"), dict),
    "excluded": list,
}
_MOST_DIMENSIONS = 64
_MOST_BYTES = 1 << 60
_RANK_SHAPE = {"bytes": int, "header": int, "crc": str, "own": dict}
MALFORMED = (LookupError, TypeError, ValueError, AttributeError, ArithmeticError, RuntimeError)
"""What code raises that finds in a file something else than it expects."""

_OWN_FILES = re.compile(
    r"(rank\d{5,}|index)-(?P<id>[0-9a-f]{8})\.(safetensors|part\.json|json)(\.new)?"
)


def data_file(rank: int, save_id: str) -> str:
    """Name of a rank's tensors."""
    return f"rank{rank:05d}-{save_id}.safetensors"


def part_file(rank: int, save_id: str) -> str:
    """Name of a rank's part of the index, which says that its tensors are written."""
    return f"rank{rank:05d}-{save_id}.part.json"


def index_file(save_id: str) -> str:
    """Name of the index."""
    return f"index-{save_id}.json"


def id_of(name: str) -> str | None:
    """The save that a file of ours belongs to; ``None`` for other files."""
    match = _OWN_FILES.fullmatch(name)
    return match["id"] if match else None


def is_plain_name(tag: str) -> bool:
    """True if ``tag`` names a folder directly below another, on any file system, beside ours.

    A name that begins or ends with a space would not be the same when it is read from ``latest``.
    """
    taken = tag.casefold().removesuffix(".new") in ("", ".", "..", LATEST, MANIFEST)
    is_text = tag.encode(errors="ignore").decode() == tag  # names of files may be none
    odd = tag != tag.strip() or set(tag) & set("/\\\0\n\r")
    return is_text and not taken and not odd and len(tag) < 200


def seal(manifest: Mapping[str, Any]) -> bytes:
    """A manifest as the bytes of its file, with their own checksum."""
    return json.dumps({"manifest": manifest, "sha256": _digest(manifest)}, indent=1).encode()


def unseal(data: bytes, place: str) -> dict[str, Any]:
    """The manifest in the bytes of a file.

    Raises:
        CheckpointError: not what :func:`seal` made, or of another format.
    """
    whole = parse(data, place)
    manifest = whole.get("manifest")
    if not isinstance(manifest, dict) or whole.get("sha256") != _digest(manifest):
        kind = whole.get("format")
        if isinstance(kind, str) and kind != FORMAT:
            raise _other_format(kind, place)
        raise CheckpointError(f"checkpoint file {place} is damaged: its checksum is another")
    if manifest.get("format") != FORMAT:
        raise _other_format(str(manifest.get("format")), place)
    return manifest


def _other_format(found: str, place: str) -> CheckpointError:
    error = CheckpointError(f"{place} has format {found[:100]!r}, expected {FORMAT!r}")
    error.other_version = True
    return error


def parse(data: bytes, place: str) -> dict[str, Any]:
    """The JSON object in ``data``.

    Raises:
        CheckpointError: there is none.
    """
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"checkpoint file {place} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"checkpoint file {place} is damaged: not a JSON object")
    return value


def extents(raw: object, dtype: torch.dtype) -> tuple[int, ...]:
    """A tensor's shape, out of a file.

    Raises:
        ValueError: no list of counts, or no tensor can be so large.
    """
    if not isinstance(raw, list) or not all(type(n) is int and n >= 0 for n in raw):
        raise ValueError("its shape is no list of counts")
    if len(raw) > _MOST_DIMENSIONS or any(n > _MOST_BYTES for n in raw):
        raise ValueError("no tensor has such a shape")
    if prod(n for n in raw if n) * dtype.itemsize > _MOST_BYTES:
        raise ValueError("no tensor is as large as that")
    return tuple(raw)


def _digest(manifest: Mapping[str, Any]) -> str:
    try:
        text = json.dumps(manifest, sort_keys=True, separators=(",", ":"))
    except RecursionError:  # deeper than what was written here, so no digest is right
        return ""
    return hashlib.sha256(text.encode()).hexdigest()


@dataclass(frozen=True)
class DataFile:
    """A file with tensors.

    Args:
        path: where it is in its storage.
        place: the same for messages.
        nbytes: its length.
    """

    path: str
    place: str
    nbytes: int


@dataclass(frozen=True)
class StoredBox:
    """A rectangle of a stored tensor.

    Args:
        file: the file that holds it.
        at: offset of its first byte; the elements follow in row-major order.
        offset: its place in the whole tensor.
        size: its extents.
        checksums: CRC-32 of its blocks, 8 digits each; empty when it has none.
    """

    file: DataFile
    at: int
    offset: tuple[int, ...]
    size: tuple[int, ...]
    checksums: str


class StoredTensor:
    """A tensor of a checkpoint: its boxes, by column, so that a search is a few tensor operations.

    Args:
        name: what messages call it.
        dtype: of its elements.
        shape: of the whole.
        columns: ``rank``, ``at`` and ``crc`` with a value per box, ``offset`` and ``size`` with a
            value per box and dimension.
        files: the files by rank.
        checked: whether boxes have checksums.

    Raises:
        ValueError, TypeError, RuntimeError: the columns do not describe boxes of such a tensor.
    """

    def __init__(
        self,
        name: str,
        dtype: torch.dtype,
        shape: tuple[int, ...],
        columns: Mapping[str, Any],
        files: Callable[[int], DataFile],
        *,
        checked: bool = True,
    ) -> None:
        self.name = name
        self.dtype = dtype
        self.shape = shape
        self._files = files
        self._checked = checked
        self._checksums = columns["crc"]
        if not isinstance(self._checksums, list) or {*map(type, self._checksums)} - {str}:
            raise ValueError("its checksums are no list of texts")
        count = len(self._checksums)
        self._ranks = _counts(columns, "rank", count)
        self._places = _counts(columns, "at", count)
        self._offsets = _counts(columns, "offset", count, len(shape))
        self._sizes = _counts(columns, "size", count, len(shape))
        bounds = torch.tensor(shape, dtype=torch.int64)
        outside = (self._offsets > bounds) | (self._sizes > bounds - self._offsets)
        if bool((self._offsets < 0).any() or (self._sizes < 0).any() or outside.any()):
            raise ValueError("a box that is no part of the tensor")
        self._boxes = Boxes(self._offsets, self._sizes)

    def __len__(self) -> int:
        """Number of boxes; a tensor without elements has none."""
        return len(self._checksums)

    def __bool__(self) -> bool:
        return True

    def box(self, index: int) -> StoredBox:
        """One box.

        Raises:
            CheckpointError: it does not fit into its file.
        """
        size = tuple(self._sizes[index].tolist())
        at, crc = int(self._places[index]), self._checksums[index]
        file = self._files(int(self._ranks[index]))
        nbytes = prod(size) * self.dtype.itemsize
        blocks = -(-nbytes // BLOCK) if self._checked else 0
        if not 0 <= at <= at + nbytes <= file.nbytes or len(crc) != 8 * blocks:
            raise CheckpointError(f"{self.name}: a box does not fit into its file {file.place}")
        return StoredBox(file, at, tuple(self._offsets[index].tolist()), size, crc)

    def overlaps(
        self, offset: tuple[int, ...], size: tuple[int, ...]
    ) -> Iterator[tuple[StoredBox, tuple[int, ...], tuple[int, ...]]]:
        """Boxes that overlap a rectangle, each with where the overlap begins and ends."""
        end = tuple(at + extent for at, extent in zip(offset, size, strict=True))
        for index, (low, high) in self._boxes.overlaps((offset, end)):
            yield self.box(index), low, high

    def is_whole(self) -> bool:
        """True if each element of the tensor is in one box."""
        ends = (self._offsets + self._sizes).tolist()
        boxes = zip(self._offsets.tolist(), ends, strict=True)
        return covers_once(boxes, (0,) * len(self.shape), self.shape)


def _counts(columns: Mapping[str, Any], key: str, *shape: int) -> torch.Tensor:
    """A column of integers.

    Raises:
        KeyError, ValueError, RuntimeError: it is none, or has another length.
    """
    column = columns[key]
    if not isinstance(column, list) or {*map(type, column)} - {int}:
        raise ValueError(f"its column {key!r} is no list of integers")
    return torch.tensor(column, dtype=torch.int64).reshape(shape)


class Stored:
    """An opened checkpoint: checked manifest and index, tensors by kind and name.

    Args:
        storage: where it lies.
        tag: its folder.

    Raises:
        CheckpointError: a file is missing, damaged, or of another format.
    """

    def __init__(self, storage: Storage, tag: str) -> None:
        self.storage = storage
        self.tag = tag
        self.place = storage.where(tag)
        if not is_plain_name(tag):
            raise CheckpointError(f"{tag!r} is not a plain directory name, so it is no tag")
        if MANIFEST not in (found := storage.names(tag)):
            unfinished = ": its save was not finished" if any(map(id_of, found)) else ""
            raise CheckpointError(f"there is no checkpoint {self.place}{unfinished}")
        path = f"{tag}/{MANIFEST}"
        self.manifest = unseal(storage.get(path, MANIFEST_LIMIT), storage.where(path))
        _require(self.manifest, _MANIFEST_SHAPE, storage.where(path))
        self.world_size: int = self.manifest["world_size"]
        self.id: str = self.manifest["id"]
        path = f"{tag}/{index_file(self.id)}"
        place = storage.where(path)
        if id_of(index_file(self.id)) is None:
            raise CheckpointError(f"manifest of {self.place} is damaged: its id is {self.id!r}")
        text = storage.get(path, _INDEX_LIMIT)
        if hashlib.sha256(text).hexdigest() != self.manifest["index"].get("sha256"):
            raise CheckpointError(f"checkpoint file {place} is damaged: its checksum is another")
        self._index = parse(text, place)
        _require(self._index, {"tensors": dict, "ranks": list}, place)
        for facts in self._index["ranks"]:
            _require(facts, _RANK_SHAPE, place)
        if len(self._index["ranks"]) != self.world_size:
            raise CheckpointError(f"{place} is not of {self.world_size} ranks")
        self._check_promises()
        self._check_amount(place)

    @cached_property
    def keys(self) -> dict[tuple[str, str], str]:
        """(kind, name) of every tensor, with its key in the index."""
        return {split_key(key): key for key in self._index["tensors"]}

    @cached_property
    def aliases(self) -> dict[str, str]:
        """Other names of tied parameters, each with the name under which the tensor is stored."""
        found = self.manifest.get("aliases", {})
        if not isinstance(found, dict) or {*map(type, found.values())} - {str}:
            raise CheckpointError(f"manifest of {self.place} is malformed: aliases are no names")
        return found

    def find(self, kind: str, name: str) -> StoredTensor | None:
        """A tensor, if the checkpoint has it."""
        key, tensors = f"{kind}/{name}", self._index["tensors"]
        return self._tensor(f"{name} ({kind})", tensors[key]) if key in tensors else None

    def own(self, rank: int) -> dict[str, StoredTensor]:
        """What belongs to one of the ranks that saved, by key; each is a single box."""
        raw = self._index["ranks"][rank]["own"]
        return {key: self._tensor(f"{key} of rank {rank}", value) for key, value in raw.items()}

    def file(self, rank: int) -> DataFile:
        """The file that a rank wrote."""
        if not 0 <= rank < self.world_size:
            raise CheckpointError(f"index of {self.place} is damaged: it names a rank {rank}")
        facts = self._index["ranks"][rank]
        path = f"{self.tag}/{data_file(rank, self.id)}"
        return DataFile(path, self.storage.where(path), facts["bytes"])

    def header(self, rank: int) -> tuple[int, str]:
        """Length of the header of a rank's file, and its checksums."""
        facts = self._index["ranks"][rank]
        if not 0 <= facts["header"] <= min(_HEADER_LIMIT, facts["bytes"]):
            raise CheckpointError(f"{self.place}: a header of {facts['header']:,} bytes is absurd")
        return facts["header"], facts["crc"]

    def _check_promises(self) -> None:
        """Make sure that what messages are made of are texts."""
        guarantee = self.manifest["guarantee"]
        texts = [guarantee.get(key, []) for key in ("weaker", "weaker_reshaped")]
        for found in [self.manifest["excluded"], *texts]:
            if not isinstance(found, list) or {*map(type, found)} - {str}:
                raise CheckpointError(f"manifest of {self.place} is malformed: a list of no texts")

    def _check_amount(self, place: str) -> None:
        """Make sure that tensors take no more memory than there are bytes in the files."""
        claimed = 0
        for key, raw in self._index["tensors"].items():
            dtype, shape = self._described(key, raw)
            claimed += prod(shape) * dtype.itemsize
        held = sum(facts["bytes"] for facts in self._index["ranks"])
        if claimed > held:
            raise CheckpointError(
                f"{place} is damaged: its tensors have {claimed:,} bytes, the files {held:,}"
            )

    def _described(self, name: str, raw: Any) -> tuple[torch.dtype, tuple[int, ...]]:
        try:
            dtype = DTYPES[raw["dtype"]]
            return dtype, extents(raw["shape"], dtype)
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{shown(name)} in {self.place} is damaged: {error}") from error

    def _tensor(self, name: str, raw: Any) -> StoredTensor:
        dtype, shape = self._described(name, raw)
        try:
            return StoredTensor(shown(name), dtype, shape, raw, self.file)
        except (KeyError, TypeError, ValueError, RuntimeError, OverflowError) as error:
            raise CheckpointError(f"{shown(name)} in {self.place} is damaged: {error}") from error


def _require(value: object, shape: Mapping[str, type], place: str) -> None:
    """Make sure that a file from somewhere else has the fields that are relied on."""
    for key, kind in shape.items():
        if not isinstance(value, dict) or type(value.get(key)) is not kind:
            raise CheckpointError(f"{place} is malformed: {key} is not a {kind.__name__}")


def shown(name: str) -> str:
    """A name out of a file as messages show it: in one line, and not without end."""
    return name if name.isprintable() and len(name) <= 200 else repr(name[:200])


def split_key(key: str) -> tuple[str, str]:
    """``(kind, name)`` of a tensor's key."""
    kind, _, name = key.partition("/")
    return kind, name
