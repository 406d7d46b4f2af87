"""Model states and activations in host memory and on NVMe.

Names are imported when they are first used, so that a config can be checked without torch.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from drivetrain_offload.file_io import AsyncFile, FileIOError, Request, aligned_empty
    from drivetrain_offload.memory import (
        MemoryRow,
        memory_table,
        memory_text,
    )
    from drivetrain_offload.on_demand import (
        StateKind,
        offload_states,
        reload_states,
        state_devices,
    )

__all__ = [
    "AsyncFile",
    "FileIOError",
    "MemoryRow",
    "Request",
    "StateKind",
    "aligned_empty",
    "memory_table",
    "memory_text",
    "offload_states",
    "reload_states",
    "state_devices",
]

_HOME = {
    "AsyncFile": "file_io",
    "FileIOError": "file_io",
    "Request": "file_io",
    "aligned_empty": "file_io",
    "MemoryRow": "memory",
    "memory_table": "memory",
    "memory_text": "memory",
    "StateKind": "on_demand",
    "offload_states": "on_demand",
    "reload_states": "on_demand",
    "state_devices": "on_demand",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module 'drivetrain_offload' has no attribute {name!r}")
    value = getattr(import_module(f"drivetrain_offload.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
