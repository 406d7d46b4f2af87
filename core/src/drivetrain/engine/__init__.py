"""The training object: how it is put together, its loop, and its data."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.lazy import lazy_names

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine as Engine
    from drivetrain.engine.loader import DataLoader as DataLoader
    from drivetrain.engine.loader import RepeatingLoader as RepeatingLoader

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "engine": "Engine",
        "loader": "DataLoader RepeatingLoader",
    },
)
