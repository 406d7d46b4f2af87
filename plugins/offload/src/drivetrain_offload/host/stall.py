"""The time that a rank waits for its host or its files, for the ledger of its job."""

from __future__ import annotations

import threading
from contextlib import AbstractContextManager, nullcontext

from drivetrain.job.job import open_jobs

OWN_THREADS = "drivetrain-"
"""How names of threads of packages begin; while one of them waits, the rank goes on."""


def stalled() -> AbstractContextManager[None]:
    """Around what is waited for: counts as ``"offload wait"`` of the job opened last."""
    jobs = open_jobs()
    if not jobs or threading.current_thread().name.startswith(OWN_THREADS):
        return nullcontext()
    return jobs[-1].span("offload wait")
