"""Plain data parallelism: every rank keeps all parameters, gradients and optimizer states."""

from drivetrain.replicated.states import ReductionPolicy, ReplicatedStates

__all__ = ["ReductionPolicy", "ReplicatedStates"]
