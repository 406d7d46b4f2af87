"""Scaling the loss so that small gradients survive fp16, and following overflows with the scale."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch

from drivetrain.errors import CheckpointError, TrainingError

_FACTOR = 2.0


class LossScaler:
    """A scale that never changes. Overflows still skip their update.

    Args:
        scale: factor of the loss; 1 for no scaling.

    Attributes:
        dynamic: whether the scale follows overflows.
        scale_value: the factor that losses are multiplied by now.
    """

    dynamic = False

    def __init__(self, scale: float = 1.0) -> None:
        self.scale_value = float(scale)

    @property
    def active(self) -> bool:
        """Whether a loss must be scaled before its backward pass."""
        return self.dynamic or self.scale_value != 1.0

    def scale(self, loss: torch.Tensor) -> torch.Tensor:
        """The scaled loss; in fp32, because the product may exceed fp16."""
        return loss.float() * self.scale_value if self.active else loss

    def update(self, overflow: bool, first_nonfinite: Callable[[], str]) -> None:
        """Tell whether the gradients of an update were finite.

        Args:
            overflow: some gradient on some rank was infinite or NaN.
            first_nonfinite: finds the name of the first such parameter, for an error.

        Raises:
            TrainingError: an overflow though the scale can shrink no further.
        """

    def state_dict(self) -> dict[str, Any]:
        """Plain numbers that continue the scale elsewhere."""
        return {"scale": self.scale_value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`; a fixed scale stays what the config says."""


class DynamicLossScaler(LossScaler):
    """Halves the scale after overflows and doubles it after a while without.

    Micikevicius et al. 2018, "Mixed Precision Training", section 3.2, with hysteresis: overflows
    are tolerated until one is left, and only then shrink the scale.

    Args:
        initial_scale: the first scale.
        window: updates without overflow after which the scale doubles.
        min_scale: the scale never falls below it.
        hysteresis: the overflow from which on the scale shrinks, counted from 1.
        consecutive_hysteresis: refill the hysteresis at every update without overflow, not only
            when the scale doubles.
    """

    dynamic = True

    def __init__(
        self,
        initial_scale: float = 2.0**16,
        *,
        window: int = 1000,
        min_scale: float = 1.0,
        hysteresis: int = 2,
        consecutive_hysteresis: bool = False,
    ) -> None:
        super().__init__(max(initial_scale, min_scale))
        self._window = window
        self._min_scale = min_scale
        self._full_hysteresis = hysteresis
        self._consecutive = consecutive_hysteresis
        self._hysteresis = hysteresis
        self._iteration = 0
        self._last_overflow = -1

    def update(self, overflow: bool, first_nonfinite: Callable[[], str]) -> None:
        if overflow:
            self._shrink(first_nonfinite)
            self._last_overflow = self._iteration
        else:
            clean = self._iteration - self._last_overflow - 1
            grow = clean > 0 and clean % self._window == 0
            if grow or self._consecutive:
                self._hysteresis = self._full_hysteresis
            if grow:
                self.scale_value *= _FACTOR
        self._iteration += 1

    def _shrink(self, first_nonfinite: Callable[[], str]) -> None:
        if self._hysteresis > 1:
            self._hysteresis -= 1
        elif self.scale_value <= self._min_scale:
            raise TrainingError(
                f"the gradient of {first_nonfinite()} is not finite at the smallest loss scale "
                f"{self._min_scale:g} (fp16.min_loss_scale), so scaling cannot help; look for a "
                "division by zero or a learning rate that is too high, or train in bf16"
            )
        else:
            self.scale_value = max(self.scale_value / _FACTOR, self._min_scale)

    def state_dict(self) -> dict[str, Any]:
        return {
            "scale": self.scale_value,
            "iteration": self._iteration,
            "last_overflow": self._last_overflow,
            "hysteresis": self._hysteresis,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from :meth:`state_dict`, also from a job that scaled by a fixed factor.

        Raises:
            CheckpointError: the state holds no usable scale.
        """
        scale = state.get("scale")
        if not isinstance(scale, (int, float)) or not scale > 0:
            raise CheckpointError(f"the saved loss scale is {scale!r}, expected a number above 0")
        self.scale_value = max(float(scale), self._min_scale)
        self._iteration = int(state.get("iteration", 0))
        self._last_overflow = int(state.get("last_overflow", -1))
        self._hysteresis = int(state.get("hysteresis", self._full_hysteresis))
