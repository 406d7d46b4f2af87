"""Safetensors files of others: their header, read with suspicion, as tensors to load from."""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from drivetrain.checkpoint.index import DataFile, StoredTensor, parse
from drivetrain.checkpoint.storage import Storage
from drivetrain.checkpoint.tensor_file import DTYPES
from drivetrain.errors import CheckpointError

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


def read_header(storage: Storage, path: str) -> dict[str, TensorPlace]:
    """Name -> place of every tensor of a file.

    Raises:
        CheckpointError: not a safetensors file, or one whose header does not fit its length.
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
    return {
        name: _place(f"{name} in {place}", raw, 8 + length, size) for name, raw in described.items()
    }


def stored_tensor(storage: Storage, path: str, name: str, place: TensorPlace) -> StoredTensor:
    """A tensor of a foreign file as one box, without checksums."""
    size = storage.size(path)
    assert size is not None
    columns: dict[str, list[Any]] = {
        "rank": [0],
        "at": [place.begin],
        "offset": [0] * len(place.shape),
        "size": list(place.shape),
        "crc": [""],
    }
    file = DataFile(path, storage.where(path), size)
    return StoredTensor(name, place.dtype, place.shape, columns, lambda _: file, checked=False)


def _place(what: str, raw: Any, begin: int, size: int) -> TensorPlace:
    try:
        dtype, shape = DTYPES[raw["dtype"]], tuple(int(extent) for extent in raw["shape"])
        start, stop = (int(offset) for offset in raw["data_offsets"])
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(f"{what} is described in a way that means nothing: {raw}") from error
    nbytes = prod(shape) * dtype.itemsize
    if min((*shape, 0)) < 0 or stop - start != nbytes or not 0 <= start <= stop <= size - begin:
        raise CheckpointError(
            f"{what} does not fit: shape {list(shape)} of {raw['dtype']} at bytes {start} to {stop}"
        )
    return TensorPlace(dtype, shape, begin + start)
