"""How requests are cut and how many are under way: the ``aio`` section, without its checks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

EngineName = Literal["auto", "io_uring", "libaio", "threads"]

KINDS: dict[EngineName, int] = {"auto": 0, "io_uring": 1, "libaio": 2, "threads": 3}
"""Numbers of ``Kind`` in queue.h."""


@dataclass(frozen=True)
class IOSettings:
    """What the keys of ``aio`` say; equal settings share one engine per process.

    Args:
        block_size: bytes of one request to the system, rounded up to whole pages.
        queue_depth: blocks under way at once, per thread.
        intra_op_parallelism: threads that share the blocks of a request.
        single_submit: hand blocks to the system one at a time.
        overlap_events: hand over new blocks while others are under way.
        engine: the system's interface.

    Raises:
        ValueError: a number is below 1, or there is no such engine.
    """

    block_size: int = 1 << 20
    queue_depth: int = 8
    intra_op_parallelism: int = 1
    single_submit: bool = False
    overlap_events: bool = True
    engine: EngineName = "auto"

    def __post_init__(self) -> None:
        for name in ("block_size", "queue_depth", "intra_op_parallelism"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if self.engine not in KINDS:
            raise ValueError(f"engine must be one of {', '.join(KINDS)}, got {self.engine!r}")
