"""Compare the first steps of a training with plain torch in one process."""

from __future__ import annotations

from drivetrain.lazy import lazy_names

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "section": "VerifySection",
        "verdict": "Finding Verdict",
    },
)
