"""1-bit Adam: after a warm-up, ranks exchange one bit per element instead of a gradient."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from drivetrain.contracts import UpdateRule
    from drivetrain.job.job import Job

__all__ = ["one_bit_adam"]


def one_bit_adam(params: Mapping[str, Any], job: Job) -> UpdateRule:
    """The rule behind ``optimizer.type: OneBitAdam``, see :mod:`drivetrain_onebit.adam`.

    Args:
        params: ``optimizer.params``.
        job: whose communicator carries the bits.

    Raises:
        ConfigError: a parameter is unknown or out of range, or model states are sharded.
    """
    from drivetrain.checked_call import call_checked
    from drivetrain.optimization.factory import PARAMS
    from drivetrain_onebit.adam import OneBitAdam

    stage = job.plan.features().get("zero_optimization.stage", 0)
    if stage:
        raise ConfigError(
            "optimizer.type = OneBitAdam cannot be combined with "
            f"zero_optimization.stage = {stage}: it averages momenta that every rank has in full; "
            "use stage 0"
        )
    rule: UpdateRule = call_checked(PARAMS, OneBitAdam, params, job.communicator)
    return rule
