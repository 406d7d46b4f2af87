"""Chunks that are alike, of which a rehearsal runs one for all.

Without memory tensors have shapes alone, so chunks of one length do the same but for the number of
chunks that they see. Pairs of chunks grow with the square of the sequence; what a rehearsal runs
does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from itertools import pairwise

import torch

from drivetrain_sequence.blocks import Sight

Kind = tuple[int, Sight, bool]
"""Of a pair: tokens of the chunk that is seen, how much of it is, and whether it sees itself."""


def is_rehearsed(device: torch.device) -> bool:
    """Whether tensors on a device have no memory."""
    return device.type == "meta"


def groups(chunks: Sequence[range], rehearsed: bool) -> list[range]:
    """Numbers of chunks, of which the last of each group runs for the whole of it.

    Ends run alone: the first chunk is watched, the second is the first to see another, and the last
    is the first of backward, which has no sums to add to yet.

    Args:
        chunks: places of their tokens; only the last may be shorter.
        rehearsed: else all are alone.
    """
    count = len(chunks)
    if not rehearsed:
        return [range(i, i + 1) for i in range(count)]
    alike = count if len(chunks[-1]) == len(chunks[0]) else count - 1
    bounds = sorted({0, 1, min(2, alike), max(1, alike - 1), alike, count})
    return [range(*pair) for pair in pairwise(bounds)]


def pairs(own: Mapping[int, Kind], each: Sequence[Counter[Kind]]) -> dict[int, int]:
    """Which chunks the one that runs looks at, and for how many pairs of its group each stands.

    Two of a kind are looked at, as then as many are on the device as ever are.

    Args:
        own: chunks that it sees, and of what kind they are.
        each: how many of each kind every chunk of the group sees.
    """
    places: dict[Kind, list[int]] = {}
    for number, kind in own.items():
        places.setdefault(kind, []).append(number)
    found: dict[int, int] = {}
    for kind, numbers in places.items():
        having = sum(kind in counts for counts in each)
        total = sum(counts[kind] for counts in each)
        if len(numbers) > 1:
            found |= {numbers[0]: having, numbers[1]: total - having}
        else:
            found[numbers[0]] = total
    return {number: found[number] for number in own if number in found}
