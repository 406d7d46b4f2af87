"""How plugins write and read their own extra state."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch

from drivetrain.errors import CheckpointError


class StateWriter:
    """Collects plain data (for JSON) and tensors under the name of whoever writes them."""

    def __init__(self) -> None:
        self.data: dict[str, Any] = {}
        self.tensors: dict[str, torch.Tensor] = {}

    def put(self, key: str, value: Any) -> None:
        """Store ``value`` under ``key``, by convention ``"plugin/what"``; taken twice is an error.

        Args:
            key: name under which :class:`StateReader` finds it again.
            value: a tensor, or plain data: numbers, strings, booleans, None, lists, dicts.

        Raises:
            CheckpointError: not plain data, or the key is taken.
        """
        if key in self.data or key in self.tensors:
            raise CheckpointError(f"two plugins write checkpoint state under {key!r}")
        if isinstance(value, torch.Tensor):
            self.tensors[key] = value
        else:
            self.data[key] = plain(value, key)


class StateReader:
    """What :class:`StateWriter` stored, and nothing else."""

    def __init__(self, data: Mapping[str, Any], tensors: Mapping[str, torch.Tensor]) -> None:
        self._data = data
        self._tensors = tensors

    def get(self, key: str, default: Any = None) -> Any:
        """The value stored under ``key``."""
        if key in self._tensors:
            return self._tensors[key]
        return self._data.get(key, default)


def plain(value: Any, what: str) -> Any:
    """``value`` if it survives JSON unchanged.

    Raises:
        CheckpointError: it does not; names the first part at fault.
    """
    fault = _first_fault(value, what)
    if fault is not None:
        raise CheckpointError(
            f"{fault} is not plain data (numbers, strings, booleans, None, lists, dicts with "
            "string keys); convert it before saving, e.g. vars(args), tensor.tolist(), str(path)"
        )
    return json.loads(json.dumps(value))


def _first_fault(value: Any, path: str) -> str | None:
    if value is None or isinstance(value, (bool, int, float, str)):
        return None
    if isinstance(value, (list, tuple)):
        faults = (_first_fault(item, f"{path}[{i}]") for i, item in enumerate(value))
    elif isinstance(value, dict):
        for key in value:
            if not isinstance(key, str):
                return f"key {key!r} of {path}"
        faults = (_first_fault(item, f"{path}.{key}") for key, item in value.items())
    else:
        return f"{path} ({type(value).__name__})"
    return next((fault for fault in faults if fault is not None), None)
