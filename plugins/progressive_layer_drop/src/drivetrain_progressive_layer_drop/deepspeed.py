"""``deepspeed.runtime.progressive_layer_drop``: the schedule as an object of a script."""

from __future__ import annotations

from drivetrain_progressive_layer_drop import theta as theta_at


class ProgressiveLayerDrop:
    """The ratio of layers to keep, which falls from 1 as a script tells it the step.

    Args:
        theta: what the ratio tends to, in [0, 1].
        gamma: how fast, per step.
    """

    def __init__(self, theta: float = 0.5, gamma: float = 0.001) -> None:
        self.theta, self.gamma = theta, gamma
        self.current_theta = 1.0

    def get_state(self) -> dict[str, bool | float]:
        """Keywords for the model's forward."""
        return {"progressive_layer_drop": True, "pld_theta": self.get_theta()}

    def get_theta(self) -> float:
        """The ratio in force."""
        return self.current_theta

    def update_state(self, global_step: int) -> None:
        """Put the ratio of a step in force."""
        self.current_theta = theta_at(global_step, self.theta, self.gamma)
