"""What runs, decided without torch: a config, the plugins that it names, and the mesh."""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "plan": "Plan",
        "registry": "Entry Registry",
    },
)
