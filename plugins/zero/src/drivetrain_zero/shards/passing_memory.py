"""Forecast how much memory whole parameters take while they are gathered."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from drivetrain_zero.gathering.unit import Reason

if TYPE_CHECKING:
    from drivetrain_zero.gathering.gatherer import GatherPolicy
    from drivetrain_zero.gathering.unit import GatheredUnit


def most_gathered(
    units: Sequence[GatheredUnit], policy: GatherPolicy, *, asynchronous: bool
) -> int:
    """Most bytes of whole parameters at once, beside those that always stay whole.

    The root is whole all through a pass, and with it the unit that computes and those that are
    gathered or fetched ahead of their use. Taken over a backward in the model's order. What is kept
    until an update is all whole by then.

    Args:
        units: the root first.
        policy: how far ahead units are gathered.
        asynchronous: whether any is gathered ahead.
    """
    if policy.until_update:
        return sum(map(_nbytes, units))
    root, *others = units
    coming = [unit for unit in reversed(others) if Reason.PERSISTENT not in unit.reasons]
    fetches = any(bucket.whole.fetches for unit in coming for bucket in unit.buckets)
    most = max(
        (_from(coming[place:], policy, asynchronous, fetches) for place in range(len(coming))),
        default=0,
    )
    return most + (0 if Reason.PERSISTENT in root.reasons else _nbytes(root))


def _from(
    units: Sequence[GatheredUnit], policy: GatherPolicy, asynchronous: bool, fetches: bool
) -> int:
    """Bytes that are whole while the first of ``units`` computes."""
    current, *following = units
    gathered = min(policy.ahead, policy.live - current.numel) if asynchronous else 0
    fetched = min(2 * policy.ahead, policy.live - current.numel) if fetches else 0
    total, elements = _nbytes(current), 0
    for place, unit in enumerate(following):
        elements += unit.numel
        very_next = fetches and place == 0 and policy.ahead > 0
        if elements > max(gathered, fetched) and not very_next:
            break
        total += _nbytes(unit)
    return total


def _nbytes(unit: GatheredUnit) -> int:
    return sum(
        bucket.packing.numel * bucket.spec.parameter_dtype.itemsize
        for bucket in unit.buckets
        if bucket.sharded
    )
