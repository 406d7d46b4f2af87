"""One rank's tensors as a safetensors file, written as a stream, with a checksum per block.

The header needs dtypes and shapes only, so it is written before any tensor is read; one tensor at a
time is in host memory.
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch

from drivetrain.checkpoint.format.storage import Sink

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK = 1 << 20
"""Bytes under one checksum: a part of a tensor is checked without reading all of it."""

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
    "C64": torch.complex64,
}
"""The format's name of each dtype."""

NAMES = {dtype: name for name, dtype in DTYPES.items()}


@dataclass(frozen=True)
class TensorEntry:
    """A tensor to be written.

    Args:
        key: its name in the file.
        dtype: of its elements.
        shape: its extents.
        read: returns it; called when its turn has come. Any device, any strides.
    """

    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    read: Callable[[], torch.Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its data."""
        return prod(self.shape) * self.dtype.itemsize


@dataclass(frozen=True)
class WrittenFile:
    """What a reader must know of a written file.

    Args:
        nbytes: of the whole file.
        header: bytes before the first tensor.
        checksum: of those.
        places: for every entry the offset of its data in the file, and the checksums of its blocks.
    """

    nbytes: int
    header: int
    checksum: str
    places: list[tuple[int, str]]


def write_tensors(
    sink: Sink, entries: Sequence[TensorEntry], metadata: Mapping[str, str] | None = None
) -> WrittenFile:
    """Write a safetensors file. Tensors are aligned if those with larger elements come first."""
    head = _header(entries, metadata)
    sink.write(head)
    at, places = len(head), []
    for entry in entries:
        data = raw_bytes(entry.read())
        assert data.numel() == entry.nbytes, f"{entry.key} is not what its fragment says"
        view = as_buffer(data)
        places.append((at, checksums(view)))
        sink.write(view)
        at += entry.nbytes
    return WrittenFile(at, len(head), checksums(head), places)


def raw_bytes(tensor: torch.Tensor) -> torch.Tensor:
    """The elements in row-major order as bytes in host memory; a view where that is possible."""
    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)


def as_buffer(data: torch.Tensor) -> memoryview:
    """The memory of bytes [n] in host memory."""
    return memoryview(data.numpy())  # type: ignore[arg-type]


def checksums(data: Buffer) -> str:
    """CRC-32 of every block, 8 hexadecimal digits each."""
    view = memoryview(data)
    blocks = (view[start : start + BLOCK] for start in range(0, len(view), BLOCK))
    return "".join(f"{zlib.crc32(block):08x}" for block in blocks)


def _header(entries: Sequence[TensorEntry], metadata: Mapping[str, str] | None) -> bytes:
    described: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    begin = 0
    for entry in entries:
        end = begin + entry.nbytes
        described[entry.key] = {
            "dtype": NAMES[entry.dtype],
            "shape": list(entry.shape),
            "data_offsets": [begin, end],
        }
        begin = end
    text = json.dumps(described, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
