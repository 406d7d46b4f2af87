"""Where consecutive parts of a list begin, as scripts of DeepSpeed ask for it."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate

from drivetrain_pipeline.balance import Layer, balance


def partition_uniform(num_items: int, num_parts: int) -> list[int]:
    """Cut items into parts whose numbers differ by one at most; the first ones have more.

    Args:
        num_items: how many there are.
        num_parts: how many parts; some are empty where there are fewer items.

    Returns:
        ``num_parts + 1`` positions: part ``i`` begins at ``bounds[i]``.
    """
    least, more = divmod(num_items, num_parts)
    sizes = (least + (part < more) for part in range(num_parts))
    return [0, *accumulate(sizes)]


def partition_balanced(weights: Sequence[float], num_parts: int) -> list[int]:
    """Cut items into parts so that the heaviest is as light as can be.

    See :func:`drivetrain_pipeline.balance.balance`, which says which of such cuts it is.

    Args:
        weights: of the items, in their order.
        num_parts: how many parts; some are empty where there are fewer items.

    Returns:
        ``num_parts + 1`` positions: part ``i`` begins at ``bounds[i]``.

    Raises:
        BalanceError: a weight is negative or not finite.
    """
    if len(weights) <= num_parts:
        return partition_uniform(len(weights), num_parts)
    return list(balance([Layer(float(weight)) for weight in weights], num_parts))


def prefix_sum_inc(weights: Sequence[float]) -> list[float]:
    """Sums of the first, the first two, and so on."""
    return list(accumulate(weights))
