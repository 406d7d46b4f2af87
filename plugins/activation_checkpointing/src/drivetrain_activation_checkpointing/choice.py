"""Which blocks to recompute under a limit of memory: those that cost the least time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

_STATES = 512
"""Sets of kept blocks that the search remembers; more of them only where all blocks differ."""

_LARGEST = 8
"""Sizes of the largest recomputed block that are tried."""


@dataclass(frozen=True)
class Cost:
    """What one block costs.

    Args:
        time: of its forward, in any unit; what recomputing it takes.
        nbytes: what its forward saves for backward beyond its inputs.
    """

    time: int
    nbytes: int


def choose(costs: Sequence[Cost], limit: int) -> frozenset[int]:
    """Choose the blocks to recompute, which take the least time in all.

    What blocks keep, and in turn what the largest recomputed one has again in backward, stay
    within ``limit``. This is the knapsack problem of what to keep, once for each size of the
    largest recomputed block. It is solved exactly (by its states that no other one dominates) as
    long as there are few different sizes, as in models of equal blocks.

    Args:
        costs: by block.
        limit: bytes for blocks beyond their inputs.

    Returns:
        Positions of the blocks to recompute; all of them where the limit is too small for any.
    """
    everything = range(len(costs))
    if sum(cost.nbytes for cost in costs) <= limit:
        return frozenset()
    best, most = frozenset(everything), 0
    for largest in sorted({cost.nbytes for cost in costs}, reverse=True)[:_LARGEST]:
        kept = [i for i in everything if costs[i].nbytes > largest]
        room = limit - largest - sum(costs[i].nbytes for i in kept)
        if room < 0:
            continue
        kept += _keep([i for i in everything if costs[i].nbytes <= largest], costs, room)
        saved = sum(costs[i].time for i in kept)
        if saved > most:
            best, most = frozenset(everything) - frozenset(kept), saved
    return best


def _keep(blocks: Sequence[int], costs: Sequence[Cost], room: int) -> tuple[int, ...]:
    """The blocks that fit into ``room`` bytes and take the most time in all."""
    front: list[tuple[int, int, tuple[int, ...]]] = [(0, 0, ())]  # bytes, time, blocks
    for i in blocks:
        cost = costs[i]
        more = [(size + cost.nbytes, time + cost.time, (*kept, i)) for size, time, kept in front]
        states = sorted(
            [*front, *(state for state in more if state[0] <= room)], key=lambda s: (s[0], -s[1])
        )
        front = []
        for state in states:
            if not front or state[1] > front[-1][1]:
                front.append(state)
        if len(front) > _STATES:
            step = len(front) / _STATES
            front = [front[int(n * step)] for n in range(_STATES - 1)] + front[-1:]
    return front[-1][2]
