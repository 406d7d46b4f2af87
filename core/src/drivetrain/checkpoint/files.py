"""Files that are whole or absent: fsync, rename, checksum."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from drivetrain.errors import CheckpointError

FORMAT = "drivetrain-checkpoint-1"
MANIFEST = "manifest.json"
LATEST = "latest"


def rank_file(rank: int, suffix: str) -> str:
    """Name of a rank's tensor file (``"safetensors"``) or index (``"json"``)."""
    return f"rank{rank:05d}.{suffix}"


def write_json(path: Path, value: Mapping[str, Any]) -> None:
    """Write ``value`` and wait until it is on the disk."""
    with path.open("w", encoding="utf-8") as file:
        json.dump(value, file, indent=1)
        file.flush()
        os.fsync(file.fileno())


def read_json(path: Path) -> dict[str, Any]:
    """Read what :func:`write_json` wrote.

    Raises:
        CheckpointError: missing or damaged.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"checkpoint file {path} is missing") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"checkpoint file {path} is damaged: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"checkpoint file {path} is damaged: not a JSON object")
    return value


def write_tensors(path: Path, tensors: dict[str, torch.Tensor]) -> str:
    """Write tensors, wait until they are on the disk, and return the file's SHA-256."""
    save_file(tensors, path)
    with path.open("rb+") as file:
        os.fsync(file.fileno())
    return checksum(path)


def checksum(path: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


class TensorFile:
    """Lazy reading of one rank's tensors, after the file has proved to be undamaged."""

    def __init__(self, path: Path, expected: str) -> None:
        if not path.exists():
            raise CheckpointError(f"checkpoint file {path} is missing")
        if checksum(path) != expected:
            raise CheckpointError(
                f"checkpoint file {path} is damaged: its checksum is not the recorded one; "
                "load an earlier tag"
            )
        try:
            self._file = safe_open(path, framework="pt", device="cpu")
        except SafetensorError as error:
            raise CheckpointError(f"checkpoint file {path} is damaged: {error}") from error

    def read(self, key: str) -> torch.Tensor:
        """The tensor stored under ``key``."""
        tensor: torch.Tensor = self._file.get_tensor(key)  # type: ignore[no-untyped-call]
        return tensor


def replace_atomically(path: Path, text: str) -> None:
    """Give ``path`` new contents in one step."""
    aside = path.with_name(f".{path.name}.new")
    with aside.open("w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(path)
    sync_directory(path.parent)


def sync_directory(path: Path) -> None:
    """Wait until renames inside ``path`` are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
