"""Agree on a gather that the common order does not have, before anything is sent.

The order itself is agreed on in :mod:`drivetrain_zero.gathering.order`. A rank that leaves it may
be the only one. Gathers of different units must never meet: at best they break the process, at
worst they mix up weights. So such a rank first writes into the store which unit it wants, and goes
on when all ranks have written the same. A rank that keeps the order writes nothing; but if it waits
in a gather for long, it writes in which. A rank that finds another one waiting for another unit at
the same place raises an error that names both.

Units are told apart by number, their place in the model: names may differ between ranks that have
other parts of it, as experts have that are shared out. Each of them gathers over an axis of its own
inside ``data``, and all come to the same places.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING

from torch.distributed.distributed_c10d import PrefixStore, Store

from drivetrain.errors import TrainingError

if TYPE_CHECKING:
    from drivetrain.job.job import Job

LONG = 2.0
"""Seconds in a gather after which a rank writes down where it is."""

_POLL = 0.02


class Agreement:
    """Lets this rank agree with the others on a unit that the common order does not have.

    Args:
        store: shared by the ranks.
        rank: this rank, of all.
        peers: the other ranks that gather with it.
        check: raises if a rank has failed.
    """

    def __init__(
        self, store: Store, rank: int, peers: Sequence[int], check: Callable[[], None]
    ) -> None:
        self._store = PrefixStore("zero/units", store)
        self._rank = rank
        self._peers = peers
        self._check = check
        self._count = 0
        self._numbers: dict[int, int] = {}  # of the latest gather of each unit
        self._waiting: tuple[int, int, str, float] | None = None
        self._written: dict[str, list[str]] = {"wants": [], "waits": []}
        self._closed = threading.Event()
        self._watch = threading.Thread(target=self._write_waits, daemon=True, name="zero-agreement")
        self._watch.start()

    def begin(self, unit: int, name: str, *, known: bool) -> None:
        """Make the gather of ``unit`` the next one.

        Args:
            unit: its number, the same on all ranks.
            name: what this rank calls it.
            known: the order says so; otherwise this returns once all ranks agree.

        Raises:
            TrainingError: another rank needs another unit.
        """
        self._count += 1
        self._numbers[unit] = self._count
        if not known:
            self._agree(unit, name)

    @contextmanager
    def waits(self, unit: int, name: str) -> Iterator[None]:
        """Wait in the block for the latest gather of ``unit``."""
        self._waiting = (self._numbers.get(unit, 0), unit, name, time.monotonic())
        try:
            yield
        finally:
            self._waiting = None

    def close(self) -> None:
        """End the watch."""
        self._closed.set()
        self._watch.join()

    def _agree(self, unit: int, name: str) -> None:
        self._write("wants", self._count, unit, name)
        missing = set(self._peers)
        while True:
            for peer in tuple(missing):
                wanted = self._read("wants", peer)
                found = wanted if wanted is not None else self._read("waits", peer)
                if found is None:
                    continue
                if found[0] == unit:
                    missing.discard(peer)
                else:
                    raise TrainingError(
                        f"rank {self._rank} needs unit {name or 'root'!r} of the model while rank "
                        f"{peer} needs {found[1] or 'root'!r}: ranks walk through the model "
                        "differently; see 'ranks that walk differently' in the README of "
                        "drivetrain-zero"
                    )
            if not missing:
                return
            self._check()
            time.sleep(_POLL)

    def _write(self, what: str, count: int, unit: int, name: str) -> None:
        """Write down which unit this rank wants, or waits for, at its gather ``count``.

        Others may read it after this rank has agreed and gone on, where no gather holds it up: of
        the ranks that agree, not all gather over the same axis. When this rank writes its next but
        one, all of them have written the one in between, and have read this.
        """
        key, written = f"{what}/{self._rank}/{count}", self._written[what]
        self._store.set(key, json.dumps([unit, name]))
        written.append(key)
        while len(written) > 2:
            self._store.delete_key(written.pop(0))

    def _read(self, what: str, peer: int) -> tuple[int, str] | None:
        """Number and name that a rank has written about the gather that this rank is at."""
        key = f"{what}/{peer}/{self._count}"
        if not self._store.check([key]):
            return None
        unit, name = json.loads(self._store.get(key))
        return int(unit), str(name)

    def _write_waits(self) -> None:
        """Write down a gather that lasts long, once."""
        written = 0
        while not self._closed.wait(LONG / 4):
            waiting = self._waiting
            if waiting is None or time.monotonic() - waiting[3] < LONG or waiting[0] == written:
                continue
            written = waiting[0]
            try:
                self._write("waits", *waiting[:3])
            except RuntimeError:
                return  # the store went with the process that hosts it; the job is over


def agreement_of(job: Job) -> Agreement | None:
    """The agreement of the data-parallel ranks of a job; ``None`` if there is only one."""
    ranks = job.mesh.ranks("data")
    if job.failures is None or len(ranks) == 1:
        return None
    peers = [rank for rank in ranks if rank != job.rank]
    check = partial(job.failures.check, "agreeing on the next unit")
    return Agreement(job.failures.store, job.rank, peers, check)
