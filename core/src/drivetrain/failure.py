"""How one rank's error reaches the others, whose collectives break when it goes.

The protocol, over the store of the default process group:

1. The rank that raises writes its error under one key; the first writer wins.
2. It destroys its process groups, so that collectives which wait for it break on the other ranks.
3. A rank whose collective breaks reads the key and raises what it says. Unless that is caught, the
   rank goes through 1 and 2 as well, which breaks those that wait for *it*.
4. Every rank that knows the error says so. Rank 0, which may host the store, waits for that before
   it goes.
"""

from __future__ import annotations

import json
import logging
import sys
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta
from types import TracebackType
from typing import TYPE_CHECKING

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from drivetrain.errors import CommunicationError

if TYPE_CHECKING:
    from drivetrain.job import Job

logger = logging.getLogger("drivetrain.failure")

_NOTICE_SECONDS = 1.0
"""How long a broken collective looks for its cause, which is written before anything breaks."""

_FAREWELL_SECONDS = 5.0
"""How long rank 0 stays for the others to read the cause."""

_POLL_SECONDS = 0.02

_STORE_IS_GONE = (dist.DistError,)
"""What the store raises when the process that hosts it has died; nobody is left to tell then."""

_open_jobs: list[Job] = []


@dataclass(frozen=True)
class Failure:
    """The first error of a job.

    Args:
        rank: the rank that raised it.
        error: its type and message.
    """

    rank: int
    error: str

    def __str__(self) -> str:
        return f"rank {self.rank} failed: {self.error}"


class FailureBoard:
    """Where the ranks of one job tell each other of a failure.

    Args:
        store: shared by all ranks; plugins may keep keys of their own under a prefix.
        rank: this rank.
        world_size: number of ranks.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.store = store
        self._rank = rank
        self._world_size = world_size
        self._acknowledged = False

    def record(self, error: BaseException) -> None:
        """Write ``error`` as the job's failure unless there is one already."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        notice = json.dumps({"rank": self._rank, "error": text})
        with suppress(*_STORE_IS_GONE):
            self.store.compare_set("failure", "", notice)
            self._acknowledge()

    def first(self, wait: float = 0.0) -> Failure | None:
        """The job's failure, if there is one within ``wait`` seconds."""
        deadline = time.monotonic() + wait
        with suppress(*_STORE_IS_GONE):
            while not self.store.check(["failure"]):
                if time.monotonic() > deadline:
                    return None
                time.sleep(_POLL_SECONDS)
            notice = json.loads(self.store.get("failure"))
            self._acknowledge()
            return Failure(notice["rank"], notice["error"])
        return Failure(0, "lost contact with the store of the process group, which rank 0 hosts")

    def check(self, what: str) -> None:
        """For ranks that wait for others by themselves.

        Raises:
            CommunicationError: another rank has failed, which breaks off ``what``.
        """
        failure = self.first()
        if failure is not None and failure.rank != self._rank:
            raise CommunicationError(f"{what} was broken off because {failure}")

    def explain(self, what: str, error: BaseException) -> CommunicationError:
        """The exception to raise when ``what`` broke with torch's ``error``."""
        failure = self.first(_NOTICE_SECONDS)
        if failure is None or failure.rank == self._rank:
            return broken(what, error)
        return CommunicationError(f"{what} was broken off because {failure}")

    def meet(self, name: str, ranks: int) -> None:
        """Wait until ``ranks`` ranks have called this with ``name``, or one rank has failed.

        Raises:
            CommunicationError: a rank failed; names it.
        """
        if self.store.add(f"met/{name}", 1) == ranks:
            self.store.set(f"all/{name}", "")
        while True:
            try:
                self.store.wait([f"all/{name}"], timedelta(seconds=1))
            except dist.DistStoreError:  # the second is over
                self.check(f"creating process group {name}")
            else:
                return

    def farewell(self) -> None:
        """On rank 0, wait until all ranks know of the failure, but not for long."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        with suppress(*_STORE_IS_GONE):
            while self._rank == 0 and self.store.add("acknowledged", 0) < self._world_size:
                if time.monotonic() > deadline:
                    return
                time.sleep(_POLL_SECONDS)

    def leave(self) -> None:
        """Say that this rank needs to be told of nothing any more."""
        with suppress(*_STORE_IS_GONE):
            self._acknowledge()

    def _acknowledge(self) -> None:
        if not self._acknowledged:
            self._acknowledged = True
            self.store.add("acknowledged", 1)


def broken(what: str, error: BaseException) -> CommunicationError:
    """The exception to raise when nobody knows more than how ``what`` broke."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return CommunicationError(f"{what} failed: {lines[0]}")


def open_jobs() -> list[Job]:
    """The jobs of this process that are open, in the order in which they were opened."""
    return list(_open_jobs)


def watch(job: Job) -> None:
    """Report uncaught exceptions of this process as ``job``'s failure, until :func:`unwatch`."""
    if not _open_jobs:
        _Excepthook.install()
    _open_jobs.append(job)


def unwatch(job: Job) -> None:
    """End :func:`watch`."""
    if job in _open_jobs:
        _open_jobs.remove(job)
        if not _open_jobs:
            _Excepthook.uninstall()


class _Excepthook:
    """Goes before whatever ``sys.excepthook`` was."""

    installed: _Excepthook | None = None

    def __init__(self) -> None:
        self.previous = sys.excepthook

    @classmethod
    def install(cls) -> None:
        cls.installed = cls()
        sys.excepthook = cls.installed

    @classmethod
    def uninstall(cls) -> None:
        # Somebody who chained another hook since keeps ours, which then does nothing but call on.
        if cls.installed is not None and sys.excepthook is cls.installed:
            sys.excepthook = cls.installed.previous
            cls.installed = None

    def __call__(
        self, kind: type[BaseException], error: BaseException, traceback: TracebackType | None
    ) -> None:
        self.previous(kind, error, traceback)
        for job in tuple(_open_jobs):  # failing closes a job
            job.fail(error)
