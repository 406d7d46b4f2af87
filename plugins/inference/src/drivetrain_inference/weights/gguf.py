"""Weights as a GGUF file has them: its blocks are rearranged, never rounded again."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from drivetrain.contracts import Packed, WeightFormat
from drivetrain.errors import ConfigError
from drivetrain_inference.weights.blocks import Q40, Q41, Q80, BlockFormat
from drivetrain_inference.weights.bound import BoundFormat, Product

_KINDS: dict[str, type[BlockFormat]] = {"Q4_0": Q40, "Q4_1": Q41, "Q8_0": Q80}
_HEADER = {"Q4_0": 2, "Q4_1": 4, "Q8_0": 2}
"""Bytes of a block before its codes: the float16 scale, and the offset."""


class FileFormat(BoundFormat):
    """The blocks of one file, found by the values that they stand for.

    A loader reorders rows (heads of queries and keys), joins and renames tensors. So a weight's
    rows are looked up one by one among the rows of the file: equal values have equal blocks. A
    weight with rows of several kinds, or of a kind without a kernel, is packed as Q8_0 instead.

    Args:
        path: the GGUF file.
        dtype: of the module that was loaded from it.

    Raises:
        ConfigError: the file has no blocks that can be used.
    """

    def __init__(self, path: Path, dtype: torch.dtype) -> None:
        from gguf import GGUFReader
        from gguf.quants import dequantize

        self._dtype, self._raw = dtype, list[tuple[str, torch.Tensor]]()
        self._rows: dict[bytes, tuple[int, int]] = {}
        for tensor in GGUFReader(path).tensors:
            kind: str = tensor.tensor_type.name
            if kind not in _KINDS or len(tensor.shape) != 2:
                continue
            values = torch.from_numpy(dequantize(tensor.data, tensor.tensor_type)).to(dtype)
            for row, key in enumerate(_keys(values)):
                self._rows[key] = (len(self._raw), row)
            self._raw.append((kind, torch.from_numpy(np.array(tensor.data))))
        if not self._raw:
            known = ", ".join(_KINDS)
            raise ConfigError(
                f"inference.weight_format: {path} has no tensors of {known}, so there is nothing "
                "that gguf could use as it is; choose another format"
            )
        self._rest = Q80()

    def tensors(self, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        return self._rest.tensors(shape)

    def bytes(self, shape: Sequence[int]) -> int:
        return self._rest.bytes(shape)

    def has(self, weight: torch.Tensor) -> bool:
        """Whether all rows of ``weight`` are blocks of one kind in the file."""
        return self._found(weight) is not None

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        found = self._found(weight)
        if found is None:
            return self._rest.pack(weight)
        kind, rows = found
        codes, parameters = _split(kind, rows)
        return _KINDS[kind]().packed(codes, parameters)

    def unpack(self, packed: Packed, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return _form_of(packed).unpack(packed, shape, dtype)

    def multiply(self, x: torch.Tensor, packed: Packed, outputs: int) -> torch.Tensor:
        return _form_of(packed).multiply(x, packed, outputs)

    def bind(self, packed: Packed, outputs: int, *, invariant: bool) -> Product:
        return _form_of(packed).bind(packed, outputs, invariant=invariant)

    def _found(self, weight: torch.Tensor) -> tuple[str, torch.Tensor] | None:
        places = [self._rows.get(key) for key in _keys(weight.detach().to(self._dtype))]
        kinds = {self._raw[place[0]][0] for place in places if place is not None}
        if None in places or len(kinds) != 1:
            return None
        rows = [self._raw[place[0]][1][place[1]] for place in places if place is not None]
        return kinds.pop(), torch.stack(rows)


def format_of_file(path: Path | None, dtype: torch.dtype) -> WeightFormat:
    """The format ``gguf`` for a module that was loaded from ``path``.

    Raises:
        ConfigError: it was not loaded from a GGUF file.
    """
    if path is None or path.suffix != ".gguf":
        raise ConfigError(
            "inference.weight_format: gguf keeps the blocks of a GGUF file, and the model was not "
            "loaded from one; name the file in serve(), or choose q4_0, q4_1 or q8_0"
        )
    return FileFormat(path, dtype)


def _keys(values: torch.Tensor) -> list[bytes]:
    rows: Any = values.contiguous().view(torch.uint8).numpy()
    return [hashlib.blake2b(row, digest_size=16).digest() for row in rows]


def _split(kind: str, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes [out, blocks, 32], uint8, and parameters [out, blocks, 1 or 2] of raw rows."""
    header = _HEADER[kind]
    blocks = rows.view(len(rows), -1, header + (32 if kind == "Q8_0" else 16))
    parameters = blocks[:, :, :header].contiguous().view(torch.float16)
    raw = blocks[:, :, header:]
    if kind == "Q8_0":
        return raw ^ 128, parameters  # signed bytes with 128 added
    return torch.cat([raw & 15, raw >> 4], dim=2), parameters


def _form_of(packed: Packed) -> BlockFormat:
    words, parameters = packed["codes"].shape[2], packed["parameters"].shape[2]
    if words == 8:
        return Q80()
    return Q41() if parameters == 2 else Q40()
