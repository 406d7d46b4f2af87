"""Full weights of a checkpoint as safetensors files that other libraries load."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator
from functools import partial

import torch

from drivetrain.checkpoint.format.index import Stored, StoredTensor
from drivetrain.checkpoint.format.reading import read_whole
from drivetrain.checkpoint.format.safetensors_file import INDEX
from drivetrain.checkpoint.format.storage import open_storage
from drivetrain.checkpoint.format.tensor_file import TensorEntry, write_tensors
from drivetrain.checkpoint.opening import check_files
from drivetrain.errors import CheckpointError

logger = logging.getLogger("drivetrain.checkpoint")

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


_METADATA = {"format": "pt"}
"""Transformers refuses files that do not say so."""


def export(
    stored: Stored,
    folder: str,
    *,
    dtype: str = "fp32",
    max_shard_bytes: int = 5_000_000_000,
    config: bytes | None = None,
) -> list[str]:
    """Write all parameters and buffers whole, under the names of the module's ``state_dict``.

    A tied parameter is written under each of its names, so that a strict load works.

    One tensor is in memory at a time. Parameters are rounded once, from their master weights where
    there are some; buffers keep their dtype unless they are floating point.

    Args:
        stored: the checkpoint.
        folder: new or empty; a path or a URL.
        dtype: ``fp32``, ``bf16`` or ``fp16``.
        max_shard_bytes: a file is closed before it would become larger.
        config: a model's ``config.json``, to lie beside the weights.

    Returns:
        Names of the files with weights.

    Raises:
        CheckpointError: the folder is not empty, or the checkpoint is damaged or has no weights.
    """
    if dtype not in DTYPES:
        raise CheckpointError(f"dtype {dtype!r} is none of {', '.join(DTYPES)}")
    entries = weights_of(stored, DTYPES[dtype])
    names = write_weights(entries, folder, max_shard_bytes=max_shard_bytes, config=config)
    logger.info("exported %d tensors of %s to %s", len(entries), stored.place, folder)
    return names


def write_weights(
    entries: list[TensorEntry],
    folder: str,
    *,
    max_shard_bytes: int = 5_000_000_000,
    config: bytes | None = None,
) -> list[str]:
    """Write tensors as safetensors files in the layout of the Hugging Face Hub.

    Args:
        entries: what is read when its turn has come.
        folder: new or empty; a path or a URL.
        max_shard_bytes: a file is closed before it would become larger.
        config: a model's ``config.json``, to lie beside the weights.

    Returns:
        Names of the files with weights.

    Raises:
        CheckpointError: the folder is not empty.
    """
    target = open_storage(folder)
    if target.names():
        raise CheckpointError(f"{folder} is not empty; export into a new folder")
    shards = shards_of(entries, max_shard_bytes)
    names = [
        f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        for number in range(1, len(shards) + 1)
    ]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for name, shard in zip(names, shards, strict=True):
        with target.writing(name) as sink:
            write_tensors(sink, shard, _METADATA)
    if config is not None:
        target.put("config.json", config)
    if len(shards) > 1:
        places = {e.key: n for n, shard in zip(names, shards, strict=True) for e in shard}
        total = sum(entry.nbytes for entry in entries)
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        target.put(INDEX, json.dumps(content, indent=2).encode())
    return names


def weights_of(stored: Stored, dtype: torch.dtype) -> list[TensorEntry]:
    """All parameters and buffers of a checkpoint, in a stable order; nothing is read yet.

    A tied parameter is there under each of its names, the one that is stored first.

    Args:
        stored: the checkpoint.
        dtype: of what is floating point.

    Raises:
        CheckpointError: it is damaged, or has no weights.
    """
    check_files(stored)
    entries = list(_entries(stored, dtype))
    if not entries:
        raise CheckpointError(f"{stored.place} has no parameters")
    return entries


def _entries(stored: Stored, dtype: torch.dtype) -> Iterator[TensorEntry]:
    """The weights, in a stable order; nothing is read yet."""
    names = dict.fromkeys(
        name for kind, name in sorted(stored.keys) if kind in ("parameter", "master", "buffer")
    )
    others: dict[str, list[str]] = {}
    for alias, name in sorted(stored.aliases.items()):
        if alias not in names:
            others.setdefault(name, []).append(alias)
    for name in names:
        source = stored.find("parameter", name) or stored.find("buffer", name)
        if source is None or (source.dtype.is_floating_point and source.dtype != dtype):
            source = stored.find("master", name) or source
        assert source is not None
        to = dtype if source.dtype.is_floating_point else source.dtype
        read = partial(_read, stored, source, to)
        for own in (name, *others.get(name, ())):
            yield TensorEntry(own, to, source.shape, read)


def _read(stored: Stored, source: StoredTensor, dtype: torch.dtype) -> torch.Tensor:
    return read_whole(stored.storage, source).to(dtype)


def shards_of(entries: list[TensorEntry], limit: int) -> list[list[TensorEntry]]:
    """Entries by file, of which none is larger than ``limit`` bytes unless one tensor is."""
    shards: list[list[TensorEntry]] = [[]]
    size = 0
    for entry in entries:
        if shards[-1] and size + entry.nbytes > limit:
            shards.append([])
            size = 0
        shards[-1].append(entry)
        size += entry.nbytes
    return [sorted(shard, key=lambda entry: -entry.dtype.itemsize) for shard in shards]


def parse_size(text: str) -> int:
    """Bytes of a size such as ``5GB``, ``500MB`` or ``1000000``.

    Raises:
        CheckpointError: not a size.
    """
    units = {"KB": 1000, "MB": 1000**2, "GB": 1000**3, "KIB": 1 << 10, "MIB": 1 << 20}
    units |= {"GIB": 1 << 30}
    number, unit = text.strip().upper(), 1
    for name, factor in units.items():
        if number.endswith(name):
            number, unit = number.removesuffix(name), factor
            break
    try:
        size = int(float(number) * unit)
    except ValueError:
        raise CheckpointError(f"{text!r} is no size; write 5GB, 500MB or 1000000") from None
    if size < 1:
        raise CheckpointError(f"{text!r} is no size: it must be positive")
    return size
