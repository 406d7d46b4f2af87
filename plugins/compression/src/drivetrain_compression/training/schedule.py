"""How bits and ratios fall with the steps."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any


@dataclass
class BitSchedule:
    """The bits of one weight: they fall by one whenever a period is over, and periods double.

    Args:
        bits: now.
        target: at last.
        period: the calls of :meth:`advance` after which bits fall next.
        change: by how much the share of the unquantised weight falls per call; 0 for no mixing.
        ratio: that share.
        calls: of :meth:`advance` so far.
    """

    bits: int
    target: int
    period: int
    change: float = 0.0
    ratio: float = 0.0
    calls: int = 0

    def advance(self, factor: int = 1) -> bool:
        """Go on by one step.

        Args:
            factor: what the next period is longer by, 1 to 5, where the Hessian says so.

        Returns:
            Whether bits fell.
        """
        self.calls += 1
        if self.change:
            start = 1.0 if self.calls == 1 else self.ratio
            self.ratio = start - self.change if start >= self.change else 0.0
        if self.bits == self.target or self.calls < self.period:
            return False
        self.ratio = 1.0 if self.change else 0.0
        self.period = 2 * self.period * factor
        self.bits -= 1
        return True

    def state(self) -> dict[str, Any]:
        """Plain data that :meth:`load` takes."""
        return asdict(self)

    def load(self, state: dict[str, Any]) -> None:
        """Go on from a state."""
        for key, value in state.items():
            setattr(self, key, value)


def eigenvalue_factor(eigenvalue: float) -> int:
    """How much longer a period is where curvature is ``eigenvalue`` of the largest, in [0, 1]."""
    return 1 + math.floor(4 * eigenvalue)
