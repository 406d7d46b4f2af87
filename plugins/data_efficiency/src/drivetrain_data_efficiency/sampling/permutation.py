"""A random order of numbers below n that takes no memory: any part of it is computed by itself.

A Feistel network (Luby and Rackoff 1988) permutes a power of 4; numbers beyond n are sent through
it again until they are below (cycle walking, Black and Rogaway 2002).
"""

from __future__ import annotations

import hashlib
from typing import Any

import numpy as np
import numpy.typing as npt

ROUNDS = 6
_FIRST, _SECOND = np.uint64(0xBF58476D1CE4E5B9), np.uint64(0x94D049BB133111EB)


def seed_of(*place: str | int) -> int:
    """64 bits for a place, alike on all machines."""
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:8], "little")


def mixed(values: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """The finaliser of SplitMix64 (Steele, Lea and Flood 2014), element by element."""
    values = (values ^ (values >> np.uint64(30))) * _FIRST
    values = (values ^ (values >> np.uint64(27))) * _SECOND
    return values ^ (values >> np.uint64(31))


class Permutation:
    """A permutation of ``range(size)``.

    Args:
        size: at least 1.
        place: names the permutation among all others.
    """

    def __init__(self, size: int, *place: str | int) -> None:
        assert size >= 1, size
        self.size = size
        self._half = max(1, -(-(size - 1).bit_length() // 2))
        keys = [seed_of(*place, number) for number in range(ROUNDS)]
        self._keys = np.array(keys, np.uint64)

    def part(self, start: int, stop: int) -> npt.NDArray[np.int64]:
        """The images of ``range(start, stop)``, int64."""
        values = np.arange(start, stop, dtype=np.uint64)
        values = self._once(values)
        while len(beyond := np.flatnonzero(values >= np.uint64(self.size))):
            values[beyond] = self._once(values[beyond])
        return values.astype(np.int64)

    def _once(self, values: Any) -> npt.NDArray[np.uint64]:
        shift, mask = np.uint64(self._half), np.uint64((1 << self._half) - 1)
        left, right = values >> shift, values & mask
        for key in self._keys:
            left, right = right, left ^ (mixed(right + key) & mask)
        joined: npt.NDArray[np.uint64] = (left << shift) | right
        return joined
