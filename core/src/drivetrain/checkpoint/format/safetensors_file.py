"""Safetensors files that other programs wrote: check their header, find the tensors in them."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

import torch

from drivetrain.checkpoint.format.index import (
    DataFile,
    StoredTensor,
    extents,
    is_plain_name,
    parse,
    shown,
)
from drivetrain.checkpoint.format.storage import LocalStorage, Storage, open_storage
from drivetrain.checkpoint.format.tensor_file import DTYPES
from drivetrain.errors import CheckpointError

INDEX = "model.safetensors.index.json"

_SINGLE = "model.safetensors"
_INDEX_LIMIT = 1 << 28
_HEADER_LIMIT = 100_000_000
"""Bytes, the limit of the format."""


@dataclass(frozen=True)
class TensorPlace:
    """Where a tensor lies in its file.

    Args:
        dtype: of its elements.
        shape: its extents.
        begin: offset of its first byte in the file.
    """

    dtype: torch.dtype
    shape: tuple[int, ...]
    begin: int

    @property
    def end(self) -> int:
        """Offset behind its last byte."""
        return self.begin + prod(self.shape) * self.dtype.itemsize


def read_header(storage: Storage, path: str) -> dict[str, TensorPlace]:
    """Name -> place of every tensor of a file.

    Raises:
        CheckpointError: not a safetensors file, or one whose tensors do not make up the file.
    """
    place, size = storage.where(path), storage.size(path)
    if size is None:
        raise CheckpointError(f"file {place} is missing")
    if size < 8:
        raise CheckpointError(f"file {place} is damaged: {size} bytes are no safetensors file")
    head = bytearray(8)
    storage.read(path, 0, head)
    length = int.from_bytes(head, "little")
    if length > min(_HEADER_LIMIT, size - 8):
        raise CheckpointError(
            f"file {place} is damaged, or no safetensors file: its header claims {length:,} bytes, "
            f"the file has {size:,}"
        )
    text = bytearray(length)
    storage.read(path, 8, text)
    described = parse(bytes(text), place)
    described.pop("__metadata__", None)
    found = {
        name: _place(f"{shown(name)} in {place}", raw, 8 + length, size)
        for name, raw in described.items()
    }
    _check_order(found, 8 + length, size, place)
    return found


def stored_tensors(storage: Storage, path: str) -> dict[str, StoredTensor]:
    """The tensors of a foreign file, each as one box, without checksums.

    Raises:
        CheckpointError: see :func:`read_header`.
    """
    places = read_header(storage, path)
    file = DataFile(path, storage.where(path), storage.size(path) or 0)
    return {name: _stored(shown(name), place, file) for name, place in places.items()}


def find_weights(storage: Storage) -> dict[str, StoredTensor]:
    """Name -> tensor of all weights in a folder; nothing but headers is read.

    Raises:
        CheckpointError: there are none, or a file is damaged or not where it may be.
    """
    names = storage.names()
    if INDEX in names:
        index = parse(storage.get(INDEX, _INDEX_LIMIT), storage.where(INDEX))
        weights = index.get("weight_map")
        if not isinstance(weights, dict):
            raise CheckpointError(f"{storage.where(INDEX)} is damaged: it has no weight_map")
        for file in weights.values():
            if not isinstance(file, str) or not is_plain_name(file):
                raise CheckpointError(
                    f"{storage.where(INDEX)} names {str(file)[:100]!r}, which leads elsewhere"
                )
        files = sorted(set(weights.values()))
    else:
        weights, files = None, [_SINGLE] if _SINGLE in names else []
    if not files:
        raise CheckpointError(
            f"{storage.root} has no {_SINGLE} and no {INDEX}; weights in .bin files are pickles: "
            "convert them to safetensors first"
        )
    found = {
        name: tensor
        for file in files
        for name, tensor in stored_tensors(storage, file).items()
        if weights is None or weights.get(name) == file
    }
    if weights is not None and (lost := sorted(set(weights) - set(found))):
        listed = ", ".join(map(shown, lost[:5]))
        raise CheckpointError(f"{storage.root} lacks {listed}, which its index names")
    return found


def open_weights(folder: str) -> Storage:
    """The storage of a folder of weights.

    The Hub's cache keeps files in ``blobs`` and links to them in ``snapshots/<revision>``.
    """
    snapshots = Path(folder).resolve().parent
    if "://" not in folder and snapshots.name == "snapshots":
        return LocalStorage(folder, boundary=str(snapshots.parent))
    return open_storage(folder)


def _stored(name: str, place: TensorPlace, file: DataFile) -> StoredTensor:
    columns: dict[str, list[Any]] = {
        "rank": [0],
        "at": [place.begin],
        "offset": [0] * len(place.shape),
        "size": list(place.shape),
        "crc": [""],
    }
    return StoredTensor(name, place.dtype, place.shape, columns, lambda _: file, checked=False)


def _check_order(found: Mapping[str, TensorPlace], begin: int, size: int, place: str) -> None:
    """Make sure that tensors fill the file without gaps and overlaps, as the format demands.

    A small file whose tensors lie over each other would become a large checkpoint.
    """
    at = begin
    for tensor in sorted(found.values(), key=lambda tensor: (tensor.begin, tensor.end)):
        if tensor.begin != at:
            problem = "lie over each other" if tensor.begin < at else "have a gap between them"
            raise CheckpointError(f"file {place} is damaged: its tensors {problem}")
        at = tensor.end
    if at != size:
        raise CheckpointError(
            f"file {place} is damaged: it has {size:,} bytes, and its tensors end at {at:,}"
        )


def _place(what: str, raw: Any, begin: int, size: int) -> TensorPlace:
    try:
        dtype = DTYPES[raw["dtype"]]
        shape = extents(raw["shape"], dtype)
        start, stop = raw["data_offsets"]
        nbytes = prod(shape) * dtype.itemsize
        fits = type(start) is type(stop) is int and 0 <= start <= stop <= size - begin
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{what} is described in a way that means nothing: {reprlib.repr(raw)}"
        ) from error
    if not fits or stop - start != nbytes:
        raise CheckpointError(
            f"{what} does not fit: shape {list(shape)} of {raw['dtype']} at bytes "
            f"{reprlib.repr(start)} to {reprlib.repr(stop)}"
        )
    return TensorPlace(dtype, shape, begin + start)
