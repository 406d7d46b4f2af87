"""Breaking off collectives that wait on a device for a rank that has gone.

gloo's collectives break when a connection closes. Those of NCCL, RCCL and XCCL wait in kernels on
the device, which notice nothing; only an abort in the process that waits ends them. So every rank
watches the board on which a rank that fails leaves its error, and aborts its own collectives when
there is one. The next collective then raises, and core explains it with that error.

A rank that dies without a word (a kill, a crash) leaves nothing on the board: torchrun ends the
other ranks then, or the collectives' own time-out.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable
from contextlib import suppress
from typing import TYPE_CHECKING, Any

import torch
from torch.distributed import distributed_c10d as c10d

if TYPE_CHECKING:
    from drivetrain.communication.failure import FailureBoard
    from drivetrain.job.job import Job

logger = logging.getLogger("drivetrain.gpu")

INTERVAL_SECONDS = 0.5
"""How often a rank looks at the board, which is a question to the store of rank 0."""


class Watch:
    """A thread that aborts this rank's collectives once another rank has failed.

    Args:
        board: where ranks tell each other of the first error.
        rank: this rank.
        abort: breaks off every collective of this process.
    """

    def __init__(self, board: FailureBoard, rank: int, abort: Callable[[], object]) -> None:
        self._board = board
        self._rank = rank
        self._abort = abort
        self._aborted = False
        self._closing = threading.Event()
        self._thread = threading.Thread(target=self._run, name="drivetrain-watch", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """End the thread; where the job has failed, abort what is left, so that nothing waits."""
        self._closing.set()
        self._thread.join()
        if not self._aborted and self._board.first() is not None:
            self._break_off()

    def _run(self) -> None:
        while not self._closing.wait(INTERVAL_SECONDS):
            failure = self._board.first()
            if failure is not None and failure.rank != self._rank:
                logger.error("rank %d breaks its collectives off: %s", self._rank, failure)
                self._break_off()
                return

    def _break_off(self) -> None:
        self._aborted = True
        self._abort()


def watch(job: Job) -> None:
    """Abort the collectives of ``job`` on its device once another rank has failed."""
    if job.failures is not None:
        device_type = job.device.type
        watching = Watch(job.failures, job.rank, lambda: abort_collectives(device_type))
        job.on_close(watching.close)


def abort_collectives(device_type: str) -> None:
    """Break off the collectives of all process groups of this process.

    They are aborted together: two NCCL communicators that are aborted one after the other can wait
    for each other.
    """
    world = c10d.GroupMember.WORLD
    groups = list(c10d._world.pg_names)
    backend: Any = None
    with suppress(RuntimeError):  # a group of gloo alone has nothing on the device
        backend = world._get_backend(torch.device(device_type)) if world is not None else None
    together = hasattr(backend, "_group_start") and hasattr(backend, "_group_end")
    if together:
        backend._group_start()
    for group in groups:
        group.abort()
    if together:
        backend._group_end()
