"""A factor on the learning rate as a function of what was consumed: steps, samples or tokens."""

from __future__ import annotations

import math
from typing import Literal


def rate_at(
    consumed: int, *, total: int, warmup: int, decay: Literal["linear", "cosine", "none"]
) -> float:
    """From 0 to 1 in the warm-up, then to 0 at ``total``.

    Args:
        consumed: before the step.
        total: after which the factor is 0, unless it does not decay.
        warmup: of it; less than ``total``.
        decay: shape after the warm-up.
    """
    if consumed < warmup:
        return consumed / warmup
    if decay == "none":
        return 1.0
    progress = min(1.0, (consumed - warmup) / (total - warmup))
    return 1.0 - progress if decay == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))
