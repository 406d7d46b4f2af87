"""What moves bytes: the interface that the native engine and the one in Python share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any

LATENCY_BUCKETS = 256
"""``kLatencyBuckets`` of engine.h."""


@dataclass(frozen=True)
class Transfer:
    """One read or write.

    Args:
        file: what :meth:`Engine.open` answered.
        writes: from memory to the file.
        address: of the first byte in memory, which stays alive until the transfer is done.
        nbytes: how many bytes.
        offset: of the first byte in the file.
        fault: 0, or what a test makes of the first block: an errno, or -1 for a short transfer.
    """

    file: Any
    writes: bool
    address: int
    nbytes: int
    offset: int
    fault: int = 0


@dataclass(frozen=True)
class Outcome:
    """What became of a transfer.

    Args:
        error: 0, an errno, or -1 for the end of the file.
        refused: whether the file system turned out to refuse transfers past the page cache.
        offset: where in the file it failed.
        nbytes: of the part that failed.
    """

    error: int
    refused: bool
    offset: int
    nbytes: int


@dataclass(frozen=True)
class Latencies:
    """How long blocks took, from hand-over to completion.

    Args:
        blocks: how many.
        total: seconds of all together.
        counts: blocks by bucket; bucket b begins at ``2**(b // 4) * (1 + b % 4 / 4)`` nanoseconds.
    """

    blocks: int
    total: float
    counts: tuple[int, ...]

    def since(self, earlier: Latencies) -> Latencies:
        """Those of the blocks that came after ``earlier`` was taken."""
        counts = zip(self.counts, earlier.counts, strict=True)
        return Latencies(
            self.blocks - earlier.blocks,
            self.total - earlier.total,
            tuple(now - before for now, before in counts),
        )

    @property
    def mean(self) -> float:
        """Seconds."""
        return self.total / self.blocks if self.blocks else 0.0

    def quantile(self, share: float) -> float:
        """Upper end, in seconds, of the bucket that ``share`` of the blocks do not exceed."""
        seen = 0
        for bucket, count in enumerate(self.counts):
            seen += count
            if seen and seen >= share * self.blocks:
                return bucket_start(bucket + 1)
        return 0.0


def bucket_start(bucket: int) -> float:
    """Where a bucket of :class:`Latencies` begins, in seconds."""
    return 2.0 ** (bucket // 4) * (1 + bucket % 4 / 4) * 1e-9


class Engine(ABC):
    """Moves bytes between memory and files; tickets stand for transfers under way."""

    name: str
    """What serves it: ``"io_uring"``, ``"libaio"``, ``"threads"`` or ``"python"``."""

    @abstractmethod
    def open(self, direct: int, buffered: int) -> Any:
        """A file by two descriptors, which stay the caller's; ``direct`` may be -1."""

    @abstractmethod
    def forget(self, file: Any) -> None:
        """Let go of a file that has no transfers under way."""

    @abstractmethod
    def submit(self, transfer: Transfer) -> Any:
        """Begin; answers a ticket."""

    @abstractmethod
    def done(self, ticket: Any) -> bool:
        """Whether the transfer is over."""

    @abstractmethod
    def wait(self, ticket: Any, seconds: float) -> bool:
        """Wait, but not longer; answers whether it is over."""

    @abstractmethod
    def outcome(self, ticket: Any) -> Outcome:
        """What became of a transfer that is over; the ticket is void then."""

    @abstractmethod
    def latencies(self) -> Latencies:
        """Of all blocks so far."""

    @abstractmethod
    def close(self) -> None:
        """Wait for all transfers and end the threads."""
