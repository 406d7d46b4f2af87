"""Whole fp32 weights of a checkpoint, as a state dict or as files, with DeepSpeed's arguments."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

import torch
from torch import nn

from drivetrain.checkpoint.format.index import Stored
from drivetrain.checkpoint.format.tensor_file import TensorEntry
from drivetrain.checkpoint.opening import opened
from drivetrain.errors import CheckpointError
from drivetrain_checkpoint_tools.deepspeed import import_deepspeed, looks_like_deepspeed
from drivetrain_checkpoint_tools.exporting import export, parse_size, shards_of, weights_of

M = TypeVar("M", bound=nn.Module)

_INDEX = "pytorch_model.bin.index.json"


def get_fp32_state_dict_from_zero_checkpoint(
    checkpoint_dir: str | os.PathLike[str],
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
    lazy_mode: bool = False,
) -> dict[str, torch.Tensor]:
    """Read the weights of a checkpoint, whole and in fp32, onto the host.

    Args:
        checkpoint_dir: a run's folder or a checkpoint's; of ours, or of DeepSpeed.
        tag: which of the run's; the latest by default.
        exclude_frozen_parameters: must be false: checkpoints do not tell what was frozen.
        lazy_mode: accepted, has no effect: tensors are read one after the other in any case.

    Returns:
        Name -> tensor; buffers that are no floating point keep their dtype. A tied parameter is
        the same tensor under each of its names.

    Raises:
        CheckpointError: there is none, or it is damaged or has no weights.
    """
    _check(exclude_frozen_parameters)
    with _stored(checkpoint_dir, tag) as stored:
        return _tensors(stored, weights_of(stored, torch.float32))


def convert_zero_checkpoint_to_fp32_state_dict(
    checkpoint_dir: str | os.PathLike[str],
    output_dir: str,
    max_shard_size: str = "5GB",
    safe_serialization: bool = False,
    tag: str | None = None,
    exclude_frozen_parameters: bool = False,
) -> None:
    """Write the weights of a checkpoint, whole and in fp32, as files that Transformers loads.

    Args:
        checkpoint_dir: a run's folder or a checkpoint's; of ours, or of DeepSpeed.
        output_dir: new or empty.
        max_shard_size: a file is closed before it would become larger.
        safe_serialization: safetensors rather than files of ``torch.save``.
        tag: which of the run's; the latest by default.
        exclude_frozen_parameters: must be false: checkpoints do not tell what was frozen.

    Raises:
        CheckpointError: there is none, it is damaged or has no weights, or ``output_dir`` holds
            something.
    """
    _check(exclude_frozen_parameters)
    limit = parse_size(max_shard_size)
    with _stored(checkpoint_dir, tag) as stored:
        if safe_serialization:
            export(stored, output_dir, max_shard_bytes=limit)
        else:
            _write_pickled(stored, Path(output_dir), limit)


def load_state_dict_from_zero_checkpoint(
    model: M, checkpoint_dir: str | os.PathLike[str], tag: str | None = None
) -> M:
    """Load the weights of a checkpoint into a module that no engine holds.

    Args:
        model: changed in place, and moved to the host.
        checkpoint_dir: a run's folder or a checkpoint's; of ours, or of DeepSpeed.
        tag: which of the run's; the latest by default.

    Returns:
        The module.

    Raises:
        CheckpointError: there is none, or it is damaged or has no weights.
    """
    state = get_fp32_state_dict_from_zero_checkpoint(checkpoint_dir, tag)
    model = model.cpu()
    model.load_state_dict(state, strict=False)
    return model


def _check(exclude_frozen_parameters: bool) -> None:
    if exclude_frozen_parameters:
        raise CheckpointError(
            "exclude_frozen_parameters: a checkpoint does not tell what was frozen; save it with "
            "exclude_frozen_parameters"
        )


@contextmanager
def _stored(folder: str | os.PathLike[str], tag: str | None) -> Iterator[Stored]:
    """A checkpoint of either kind; DeepSpeed's is converted into a temporary folder first."""
    checkpoint_dir = os.fspath(folder)
    source = checkpoint_dir if tag is None else str(Path(checkpoint_dir, tag))
    if "://" in checkpoint_dir or not looks_like_deepspeed(source):
        with opened(checkpoint_dir, tag) as stored:
            yield stored
        return
    with (
        tempfile.TemporaryDirectory(prefix="drivetrain-import-") as temporary,
        opened(import_deepspeed(source, temporary)) as stored,
    ):
        yield stored


def _tensors(stored: Stored, entries: Iterable[TensorEntry]) -> dict[str, torch.Tensor]:
    """What is read, by name; other names of a tensor that comes before have the same."""
    found: dict[str, torch.Tensor] = {}
    for entry in entries:
        first = stored.aliases.get(entry.key)
        found[entry.key] = found[first] if first in found else entry.read()
    return found


def _write_pickled(stored: Stored, folder: Path, limit: int) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    if any(folder.iterdir()):
        raise CheckpointError(f"{folder} is not empty; write into a new folder")
    shards = shards_of(weights_of(stored, torch.float32), limit)
    places: dict[str, str] = {}
    for number, shard in enumerate(shards, 1):
        name = f"pytorch_model-{number:05d}-of-{len(shards):05d}.bin"
        name = name if len(shards) > 1 else "pytorch_model.bin"
        torch.save(_tensors(stored, shard), folder / name)
        places.update(dict.fromkeys((entry.key for entry in shard), name))
    if len(shards) > 1:
        total = sum(entry.nbytes for shard in shards for entry in shard)
        content = {"metadata": {"total_size": total}, "weight_map": dict(sorted(places.items()))}
        (folder / _INDEX).write_text(json.dumps(content, indent=2), "utf-8")
