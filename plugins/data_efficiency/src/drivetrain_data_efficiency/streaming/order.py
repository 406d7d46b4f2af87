"""The order of samples that lie in shards: shards in turn, shuffled within blocks of samples."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from drivetrain.errors import CheckpointError, ConfigError
from drivetrain_data_efficiency.sampling.permutation import Permutation

Numbers = npt.NDArray[np.int64]

_FIRST, _AT_ONCE = 1 << 9, 1 << 14
"""Samples whose order is computed at first, so that a resume begins soon, and at a time at last."""


class ShardOrder:
    """Deals samples of shards out so that readers touch few shards at a time: a ``SampleOrder``.

    Every epoch (1) shards are put in a random order, and their samples one after another; (2) this
    row is cut into ``lanes`` parts of equal length; (3) each lane is shuffled within blocks of
    ``block`` samples, as a shuffling buffer of that size would, but by a computed permutation; (4)
    lanes give ``run`` samples each in turn. All of it is computed from seed, epoch and position, so
    nothing is restored after a resume, and every sample comes once an epoch.

    The loader deals micro-batches out in turn to shards of data and their workers. So if ``lanes``
    is a multiple of data shards x workers, and ``run`` the micro-batch, a worker reads whole lanes
    that no other one reads. Other numbers of ranks, workers or samples in a micro-batch give the
    same order, and read some shards from several workers.

    Args:
        counts: [shards], samples of each.
        seed: of the order.
        lanes: parts that are read side by side.
        run: samples that a lane gives before the next lane's turn.
        block: samples that are shuffled among each other.

    Raises:
        ConfigError: a number below 1, or no samples.
    """

    def __init__(
        self, counts: Any, *, seed: int, lanes: int = 1, run: int = 1, block: int = 1
    ) -> None:
        self._counts = np.asarray(counts, dtype=np.int64)
        self._starts = np.concatenate([[0], np.cumsum(self._counts)]).astype(np.int64)
        self._total = int(self._starts[-1])
        self._seed, self._lanes, self._run, self._block = seed, lanes, run, block
        for name, value in (("lanes", lanes), ("run", run), ("block", block)):
            if value < 1:
                raise ConfigError(f"{name} of an order of shards is at least 1, got {value}")
        if not self._total:
            raise ConfigError(f"the {len(self._counts)} shards have no samples")
        cycles, rest = divmod(self._total, lanes * run)
        extra = np.clip(rest - np.arange(lanes) * run, 0, run)
        self._lengths = cycles * run + extra
        self._firsts = np.concatenate([[0], np.cumsum(self._lengths)[:-1]]).astype(np.int64)
        self._row: tuple[int, Numbers, Numbers] | None = None

    def __len__(self) -> int:
        return self._total

    def items(self, epoch: int, start: int) -> Iterator[Sequence[int]]:
        """Samples of an epoch from a position on, each an item of its own."""
        chunk, most = _FIRST, max(_AT_ONCE, 4 * self._lanes * self._run)
        while start < self._total:
            stop = min(start + chunk, self._total)
            yield from ([sample] for sample in self.samples(epoch, start, stop).tolist())
            start, chunk = stop, min(2 * chunk, most)

    def samples(self, epoch: int, start: int, stop: int) -> Numbers:
        """The samples at positions ``[start, stop)`` of an epoch, int64."""
        turns, within = np.divmod(np.arange(start, stop, dtype=np.int64), self._run)
        cycles, lanes = np.divmod(turns, self._lanes)
        places = cycles * self._run + within  # in the lane
        by_lane = np.argsort(lanes, kind="stable")
        numbers, begins = np.unique(lanes[by_lane], return_index=True)
        row = np.empty(stop - start, np.int64)
        for lane, own in zip(numbers.tolist(), np.split(by_lane, begins[1:]), strict=True):
            low, high = int(places[own[0]]), int(places[own[-1]]) + 1
            row[own] = self._firsts[lane] + self._shuffled(epoch, lane, low, high)
        order, ends = self._shards(epoch)
        found = np.searchsorted(ends, row, side="right")
        shards = order[found]
        samples: Numbers = self._starts[shards] + row - (ends[found] - self._counts[shards])
        return samples

    def _shuffled(self, epoch: int, lane: int, low: int, high: int) -> Numbers:
        """Where places ``[low, high)`` of a lane are taken from."""
        parts = []
        for block in range(low // self._block, (high - 1) // self._block + 1):
            first = block * self._block
            size = min(self._block, int(self._lengths[lane]) - first)
            shuffled = Permutation(size, "block", self._seed, epoch, lane, block)
            begin, end = max(low - first, 0), min(high - first, size)
            parts.append(first + shuffled.part(begin, end))
        return np.concatenate(parts)

    def _shards(self, epoch: int) -> tuple[Numbers, Numbers]:
        """The shards of an epoch in turn, and where each ends in the row of samples."""
        if self._row is None or self._row[0] != epoch:
            shuffled = Permutation(len(self._counts), "shards", self._seed, epoch)
            order = shuffled.part(0, len(self._counts))
            self._row = epoch, order, np.cumsum(self._counts[order])
        return self._row[1:]

    def state_dict(self, epoch: int, start: int) -> dict[str, Any]:
        """What has to agree for a position to mean the same."""
        digest = hashlib.sha256(self._counts.tobytes()).hexdigest()[:16]
        own = {"lanes": self._lanes, "run": self._run, "block": self._block, "seed": self._seed}
        return {"shards": len(self._counts), "samples": self._total, "digest": digest, **own}

    def load_state_dict(self, state: Any) -> None:
        """Check that the order is the one that was saved.

        Raises:
            CheckpointError: it is not; says what differs.
        """
        if not isinstance(state, dict) or "lanes" not in state:
            raise CheckpointError("the checkpoint's data loader had no order of shards")
        now = self.state_dict(0, 0)
        if others := [f"{key} {state.get(key)}, now {now[key]}" for key in now
                      if state.get(key) != now[key]]:  # fmt: skip
            raise CheckpointError(
                f"the order of shards in the checkpoint had {'; '.join(others)}, so other samples "
                "would come: use its shards, seed, lanes, run and block"
            )


def block_of_shards(counts: Any, shards: int) -> int:
    """Samples of so many shards, on average; at least 1."""
    counts = np.asarray(counts)
    return max(1, int(shards * counts.mean())) if len(counts) else 1
