"""Optimizers that exchange one bit per element: 1-bit Adam, 1-bit LAMB, 0/1 Adam."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_onebit.rule import OneBitRule

__all__ = ["one_bit_adam", "one_bit_lamb", "zero_one_adam"]

logger = logging.getLogger("drivetrain.onebit")


def one_bit_adam(params: Mapping[str, Any], job: Job) -> OneBitRule:
    """The rule behind ``optimizer.type: OneBitAdam``, see :mod:`drivetrain_onebit.adam`.

    Args:
        params: ``optimizer.params``.
        job: whose communicator carries the bits.

    Raises:
        ConfigError: a parameter is unknown or out of range, or model states are sharded.
    """
    from drivetrain_onebit.adam import OneBitAdam

    return _rule(OneBitAdam, params, job, "freeze_step")


def one_bit_lamb(params: Mapping[str, Any], job: Job) -> OneBitRule:
    """The rule behind ``optimizer.type: OneBitLamb``, see :mod:`drivetrain_onebit.lamb`.

    Args:
        params: ``optimizer.params``.
        job: whose communicator carries the bits.

    Raises:
        ConfigError: a parameter is unknown or out of range, or model states are sharded.
    """
    from drivetrain_onebit.lamb import OneBitLamb

    return _rule(OneBitLamb, params, job, "freeze_step")


def zero_one_adam(params: Mapping[str, Any], job: Job) -> OneBitRule:
    """The rule behind ``optimizer.type: ZeroOneAdam``, see :mod:`drivetrain_onebit.zero_one`.

    Args:
        params: ``optimizer.params``.
        job: whose communicator carries the bits.

    Raises:
        ConfigError: a parameter is unknown or out of range, or model states are sharded.
    """
    from drivetrain_onebit.zero_one import ZeroOneAdam

    return _rule(ZeroOneAdam, params, job, "var_freeze_step")


def _rule(kind: type[OneBitRule], params: Mapping[str, Any], job: Job, freeze: str) -> OneBitRule:
    from drivetrain.checked_call import call_checked
    from drivetrain.optimization.factory import PARAMS

    name = kind.__name__
    stage = job.plan.features().get("zero_optimization.stage", 0)
    if stage:
        raise ConfigError(
            f"optimizer.type = {name} cannot be combined with zero_optimization.stage = {stage}: "
            "each rank adds its own gradient to the whole momentum and keeps what compressing that "
            "leaves out, so no rank can do with a shard of them; use stage 0"
        )
    rule: OneBitRule = call_checked(PARAMS, kind, params, job.communicator)
    scheduler = job.plan.config.get("scheduler") or {}
    total = (scheduler.get("params") or {}).get("total_num_steps")
    warm_up = params.get(freeze, 100_000)
    if isinstance(total, int) and total <= warm_up and job.rank == 0:
        logger.warning(
            "%s.%s is %s, and scheduler.params.total_num_steps is %s: training ends before "
            "anything is compressed", PARAMS, freeze, warm_up, total,
        )  # fmt: skip
    return rule
