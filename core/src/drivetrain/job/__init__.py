"""One process's part of a run before there is any model."""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "job": "Job init_distributed",
    },
)
