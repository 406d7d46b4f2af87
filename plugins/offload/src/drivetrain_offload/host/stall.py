"""The time that a rank waits for its host or its files, for the ledger of its job."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

from drivetrain.job.job import open_jobs

WORKER = "drivetrain-offload"
"""Name of the thread that updates on the host; while it waits, the rank itself goes on."""


def stalled() -> AbstractContextManager[None]:
    """Around what is waited for: counts as ``"offload wait"`` of the job opened last."""
    jobs = open_jobs()
    if not jobs or threading.current_thread().name == WORKER:
        return nullcontext()
    return jobs[-1].span("offload wait")
