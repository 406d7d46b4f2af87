"""Files of ``torch.save``, read without running what they say."""

from __future__ import annotations

import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from drivetrain.errors import CheckpointError


class Inert:
    """Stands in for a class of DeepSpeed: keeps the state that it had, and does nothing."""

    def __init__(self, *arguments: Any) -> None:
        self.arguments = arguments


class LossScaler(Inert):
    """Stands in for a loss scaler."""


class FragmentAddress(Inert):
    """Where a parameter's part lies in a partition: ``start`` and ``numel``."""


class ZeroStage(int):
    """Stands in for the enumeration of stages."""


_PREFIX = "deepspeed"
_STAND_INS: list[Any] = [
    (LossScaler, f"{_PREFIX}.runtime.fp16.loss_scaler.LossScaler"),
    (LossScaler, f"{_PREFIX}.runtime.fp16.loss_scaler.DynamicLossScaler"),
    (FragmentAddress, f"{_PREFIX}.utils.tensor_fragment.fragment_address"),
    (ZeroStage, f"{_PREFIX}.runtime.zero.config.ZeroStageEnum"),
]
"""All that DeepSpeed's files name beside what torch's restricted unpickler knows."""


def read_pickled(path: Path, *, tensor: bool = False) -> dict[str, Any]:
    """The dict in a file; its tensors are mapped, so they take memory when they are used.

    Only tensors, plain data and the classes above are accepted.

    Args:
        path: of the file.
        tensor: the file may hold anything but a dict, which becomes that of ``"param"``.

    Raises:
        CheckpointError: missing, damaged, or it names anything else.
    """
    if not path.is_file():
        raise CheckpointError(f"file {path} is missing")
    _check_archive(path)
    try:
        with torch.serialization.safe_globals(_STAND_INS):
            value = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, ValueError, TypeError, KeyError, EOFError) as error:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        raise CheckpointError(
            f"file {path} is damaged, or holds what is not loaded for safety: {reason}"
        ) from error
    if not isinstance(value, dict) and tensor:
        value = {"param": value}
    if not isinstance(value, dict):
        raise CheckpointError(f"file {path} holds a {type(value).__name__}, expected a dict")
    return value


def _check_archive(path: Path) -> None:
    """Refuse what is no archive of ``torch.save``, or would grow when it is unpacked."""
    try:
        with zipfile.ZipFile(path) as archive:
            entries = archive.infolist()
    except (zipfile.BadZipFile, OSError) as error:
        raise CheckpointError(
            f"file {path} is damaged, or no file of torch.save since 1.6: {error}"
        ) from error
    size = path.stat().st_size
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise CheckpointError(f"file {path} is compressed, which torch.save never does")
    if sum(entry.file_size for entry in entries) > size:
        raise CheckpointError(f"file {path} claims to hold more than its {size:,} bytes")
