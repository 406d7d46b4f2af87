"""The chosen blocks are those that a search through all sets finds."""

from __future__ import annotations

import random
from itertools import product

import pytest
from drivetrain_activation_checkpointing.choice import Cost, choose


def search(costs: list[Cost], limit: int) -> int:
    """Least time of all sets of recomputed blocks that fit; of all blocks if none does."""
    times = [sum(cost.time for cost in costs)]
    for kept in product((False, True), repeat=len(costs)):
        again = [cost for cost, keep in zip(costs, kept, strict=True) if not keep]
        memory = sum(cost.nbytes for cost, keep in zip(costs, kept, strict=True) if keep)
        if memory + max((cost.nbytes for cost in again), default=0) <= limit:
            times.append(sum(cost.time for cost in again))
    return min(times)


@pytest.mark.parametrize("seed", range(20))
def test_the_choice_takes_the_least_time(seed: int) -> None:
    draw = random.Random(seed)
    sizes = [draw.randint(0, 30) for _ in range(3 if seed % 2 else 8)]
    costs = [Cost(draw.randint(0, 20), draw.choice(sizes)) for _ in range(8)]
    for limit in range(0, sum(cost.nbytes for cost in costs) + 2, 7):
        again = choose(costs, limit)
        assert sum(costs[i].time for i in again) == search(costs, limit)


def test_many_different_blocks_take_no_more_than_the_limit() -> None:
    draw = random.Random(0)
    costs = [Cost(draw.randint(1, 10**9), draw.randint(1, 10**9)) for _ in range(60)]
    limit = sum(cost.nbytes for cost in costs) // 2
    again = choose(costs, limit)
    kept = [cost for i, cost in enumerate(costs) if i not in again]
    assert sum(cost.nbytes for cost in kept) + max(costs[i].nbytes for i in again) <= limit
    by_size = sorted(costs, key=lambda cost: cost.nbytes / cost.time)
    greedy, memory = 0, max(cost.nbytes for cost in costs)
    for cost in by_size:
        if memory + cost.nbytes <= limit:
            greedy, memory = greedy + cost.time, memory + cost.nbytes
    assert sum(cost.time for cost in kept) > 0.97 * greedy
