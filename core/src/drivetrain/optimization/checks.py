"""Range checks that the rules' constructors share; the factory adds the config path."""

from __future__ import annotations

from collections.abc import Sequence


def check_non_negative(**values: float) -> None:
    """Raise ``ValueError`` for a value below 0."""
    for name, value in values.items():
        if not value >= 0:
            raise ValueError(f"{name} must be at least 0, got {value}")


def check_betas(betas: Sequence[float]) -> None:
    """Raise ``ValueError`` unless ``betas`` are two numbers in [0, 1)."""
    if len(betas) != 2 or not all(0 <= beta < 1 for beta in betas):
        raise ValueError(f"betas must be two numbers in [0, 1), got {list(betas)}")
