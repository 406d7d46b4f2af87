"""How rank 0 learns, while threads write, of ranks that have died or cannot write.

A rank whose disk is full cannot vote through the storage, and one that was killed says nothing at
all. So every rank writes a count to the job's store several times a second for as long as it is at
a save, and what went wrong. Rank 0 looks at both.
"""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING

import torch.distributed as dist

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from drivetrain.communication.failure import FailureBoard

_BEAT_SECONDS = 0.25

_LAST_BEAT_SECONDS = 1.0
"""How long the end of a save waits for a beat that is being written, maybe to a lost machine."""

_DEAD_SECONDS = 6.0
"""Without a beat a rank counts as dead. A rank that loads kernels may stop all threads for long."""

_DEAD_SECONDS_IN_FAILED_JOBS = 2.0
"""The same when the job has failed, since a rank's death is then likely."""


class Pulse:
    """What this rank tells of its part of one save.

    Args:
        board: of the job.
        save_id: of the save.
        rank: this rank.
    """

    def __init__(self, board: FailureBoard, save_id: str, rank: int) -> None:
        self._store: Store = board.store
        self._id = save_id
        self._rank = rank
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="checkpoint-pulse", daemon=True)
        self._thread.start()

    def refuse(self, problem: str) -> None:
        """Say that this rank's part will not come."""
        _set(self._store, f"save/refusal/{self._rank}", f"{self._id} {problem}")

    def end(self) -> None:
        """Stop; this rank has voted or refused."""
        self._ended.set()
        self._thread.join(_LAST_BEAT_SECONDS)

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(_BEAT_SECONDS):
            count += 1
            if not _set(self._store, f"save/pulse/{self._rank}", f"{self._id} {count}"):
                return


class Patient:
    """What rank 0 knows of the other ranks' parts of one save.

    Args:
        board: of the job.
        save_id: of the save.
    """

    def __init__(self, board: FailureBoard, save_id: str) -> None:
        self._board = board
        self._id = save_id
        self._last: dict[int, tuple[str, float]] = {}

    def problem(self, rank: int) -> str | None:
        """Why a rank's part will not come, if that is known."""
        refusal = self._read(f"save/refusal/{rank}")
        if refusal:
            return refusal
        beat, now = self._read(f"save/pulse/{rank}"), time.monotonic()
        last, since = self._last.setdefault(rank, (beat, now))
        if beat != last:
            self._last[rank] = (beat, now)
            return None
        silent = now - since
        failed = self._board.store.check(["failure"])
        if silent > (_DEAD_SECONDS_IN_FAILED_JOBS if failed else _DEAD_SECONDS):
            return f"it has died or hangs: no sign of life for {silent:.0f} s"
        return None

    def _read(self, key: str) -> str:
        """What a rank has said in this save; empty when nothing."""
        store = self._board.store
        if not store.check([key]):
            return ""
        save_id, _, text = store.get(key).decode(errors="replace").partition(" ")
        return text if save_id == self._id else ""


def _set(store: Store, key: str, value: str) -> bool:
    """Write to the store; false when the process that hosts it is gone."""
    try:
        store.set(key, value)
    except dist.DistError:
        return False
    return True
