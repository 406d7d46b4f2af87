"""The same bits on any layout: training whose results do not depend on the number of ranks."""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "digest": "state_hash",
        "quantum": "Quantum",
        "section": "ExactSection",
    },
)
