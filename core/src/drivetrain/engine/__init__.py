"""The training object: how it is put together, its loop, and its data."""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "engine": "Engine",
        "loader": "DataLoader RepeatingLoader",
    },
)
