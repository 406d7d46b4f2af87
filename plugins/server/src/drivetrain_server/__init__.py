"""An OpenAI-compatible server over engines that generate, each in a process of its own.

The process that speaks HTTP imports neither torch nor Transformers. Names are imported when they
are first used.
"""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "app": "create_app",
        "running": "Server",
        "settings": "Settings",
        "workers.replica": "WorkerLostError",
    },
)
