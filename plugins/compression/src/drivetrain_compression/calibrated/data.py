"""Calibration data: rows of tokens from a file, or batches as they are."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from drivetrain.errors import ConfigError
from drivetrain_compression.calibrated.first_inputs import Batch

_KEY = "input_ids"


def read_batches(
    path: Path, tokenizer_of: Path | None, *, samples: int, length: int, rows: int
) -> list[Batch]:
    """Batches of token ids from a file.

    Args:
        path: ``.safetensors`` with ``input_ids`` [n, length] (or that alone under any name);
            ``.txt``, or ``.jsonl`` with ``text`` in each line, which a tokenizer reads: documents
            are joined and cut into rows.
        tokenizer_of: folder or GGUF file of the model.
        samples: rows.
        length: tokens of a row; rows of safetensors files may be longer, and are cut.
        rows: of a batch.

    Raises:
        ConfigError: there is no such file, or it is too short; says by how much.
    """
    if not path.is_file():
        raise ConfigError(f"calibration data {path} is no file")
    ids = _from_tensors(path) if path.suffix == ".safetensors" else None
    if ids is None:
        ids = _from_text(path, tokenizer_of, length)
    if len(ids) < samples or ids.shape[1] < length:
        raise ConfigError(
            f"calibration data {path} is too short: {len(ids)} rows of {ids.shape[1]} tokens, but "
            f"{samples} rows of {length} are wanted; give more data, or lower --samples or --length"
        )
    kept = ids[:samples, :length]
    return [{_KEY: kept[start : start + rows]} for start in range(0, samples, rows)]


def as_batches(data: Iterable[Any]) -> list[Batch]:
    """Batches from mappings of arguments, or tensors of token ids.

    Raises:
        ConfigError: one is neither.
    """
    found: list[Batch] = []
    for number, entry in enumerate(data):
        if isinstance(entry, torch.Tensor):
            found.append({_KEY: entry})
        elif isinstance(entry, dict):
            found.append(entry)
        else:
            raise ConfigError(
                f"calibration batch {number} is a {type(entry).__name__}, expected a mapping of "
                "arguments or a tensor of token ids"
            )
    return found


def print_of(batches: Sequence[Mapping[str, Any]]) -> str:
    """A hash of all tensors."""
    found = hashlib.sha256()
    for batch in batches:
        for name in sorted(batch):
            value = batch[name]
            if isinstance(value, torch.Tensor):
                found.update(f"{name}{list(value.shape)}{value.dtype}".encode())
                flat = value.detach().cpu().contiguous().reshape(-1)
                found.update(bytes(flat.view(torch.uint8).numpy().data))
    return found.hexdigest()


def _from_tensors(path: Path) -> torch.Tensor:
    from safetensors.torch import load_file

    tensors = load_file(path)
    found = tensors.get(_KEY, next(iter(tensors.values())) if len(tensors) == 1 else None)
    if found is None or found.dim() != 2 or found.is_floating_point():
        raise ConfigError(f"calibration data {path} has no whole numbers {_KEY} [rows, tokens]")
    return found.to(torch.int64)


def _from_text(path: Path, tokenizer_of: Path | None, length: int) -> torch.Tensor:
    from transformers import AutoTokenizer

    where: dict[str, Any] = {"pretrained_model_name_or_path": str(tokenizer_of)}
    if tokenizer_of is None:
        raise ConfigError(f"calibration data {path} is text, and the model has no tokenizer")
    if tokenizer_of.suffix == ".gguf":
        where = {
            "pretrained_model_name_or_path": str(tokenizer_of.parent),
            "gguf_file": tokenizer_of.name,
        }
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            **where, local_files_only=True, trust_remote_code=False
        )
        texts = _texts(path)
    except (OSError, ValueError, KeyError) as error:
        raise ConfigError(f"calibration data {path} cannot be read: {error}") from error
    end = tokenizer.eos_token_id
    ids: list[int] = []
    for text in texts:
        ids += tokenizer(text)["input_ids"] + ([] if end is None else [end])
    whole = len(ids) // length * length
    return torch.tensor(ids[:whole], dtype=torch.int64).view(-1, length)


def _texts(path: Path) -> list[str]:
    whole = path.read_text("utf-8")
    if path.suffix != ".jsonl":
        return [whole]
    return [json.loads(line)["text"] for line in whole.splitlines() if line.strip()]
