"""What is in a checkpoint, tensor by tensor."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from drivetrain.checkpoint.format.index import Stored, StoredTensor
from drivetrain.checkpoint.format.reading import read_whole
from drivetrain.checkpoint.format.tensor_file import NAMES, as_buffer, raw_bytes
from drivetrain.checkpoint.opening import check_files


@dataclass(frozen=True)
class TensorFacts:
    """One tensor of a checkpoint.

    Args:
        kind: ``parameter``, ``master``, ``buffer`` or an optimizer state's name.
        name: the parameter's name.
        dtype: safetensors' name of it.
        shape: of the whole.
        nbytes: of the whole.
        boxes: how many it is stored in.
        values: what was asked for: ``sha256``, or ``norm``, ``min``, ``max``, ``non_finite``.
    """

    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int
    boxes: int
    values: dict[str, Any]


def inspect(stored: Stored, *, values: bool = False, hashes: bool = False) -> list[TensorFacts]:
    """Facts on every tensor, by kind and name.

    Args:
        stored: the checkpoint.
        values: also read them, one at a time, for norm, extremes and elements that are no numbers.
        hashes: also read them, one at a time, for the SHA-256 of their bits in row-major order.

    Raises:
        CheckpointError: the checkpoint is damaged.
    """
    if values or hashes:
        check_files(stored)
    found = []
    for kind, name in sorted(stored.keys):
        tensor = stored.find(kind, name)
        assert tensor is not None
        read: dict[str, Any] = {}
        if values or hashes:
            whole = read_whole(stored.storage, tensor)
            if hashes:
                read["sha256"] = hashlib.sha256(as_buffer(raw_bytes(whole))).hexdigest()
            if values:
                read |= _statistics(whole)
        found.append(_facts(kind, name, tensor, read))
    return found


def _facts(kind: str, name: str, tensor: StoredTensor, values: dict[str, Any]) -> TensorFacts:
    nbytes = prod(tensor.shape) * tensor.dtype.itemsize
    dtype = NAMES[tensor.dtype]
    return TensorFacts(kind, name, dtype, tensor.shape, nbytes, len(tensor), values)


def _statistics(tensor: torch.Tensor) -> dict[str, Any]:
    if not tensor.numel() or not tensor.dtype.is_floating_point:
        return {}
    wide = tensor.float() if tensor.dtype != torch.float64 else tensor
    finite = torch.isfinite(wide)
    return {
        "norm": float(torch.linalg.vector_norm(wide, dtype=torch.float64)),
        "min": float(wide.min()),
        "max": float(wide.max()),
        "non_finite": int((~finite).sum()),
    }


def overview(stored: Stored) -> dict[str, Any]:
    """What a checkpoint says of itself, as plain data."""
    manifest = stored.manifest
    axes = {axis: size for axis, size in manifest["axes"].items() if size != 1}
    return {
        "checkpoint": stored.place,
        "step": manifest["step"],
        "saved_at": manifest["saved_at"],
        "saved_by": manifest["versions"],
        "ranks": stored.world_size,
        "axes": axes,
        "bytes": sum(stored.file(rank).nbytes for rank in range(stored.world_size)),
        "guarantee": manifest["guarantee"].get("promise", ""),
        "client_state": manifest["client_state"],
    }
