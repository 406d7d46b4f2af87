"""How one rank's error reaches the others, whose collectives break when it goes.

The protocol, over the store of the default process group:

1. The rank that raises writes its error under one key; the first writer wins.
2. It destroys its process groups, so that collectives which wait for it break on the other ranks.
3. A rank whose collective breaks reads the key and raises what it says. Unless that is caught, the
   rank goes through 1 and 2 as well, which breaks those that wait for *it*.
4. A rank that finds nothing there looks which process has ended, and writes that. So a rank that
   died without a word is named, whatever carried the data, and not the first one that noticed.
5. Every rank that knows the error says so. Rank 0, which may host the store, waits for that before
   it goes.
"""

from __future__ import annotations

import json
import logging
import time
from collections import deque
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import timedelta

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from drivetrain.communication import aside, meeting, pulse
from drivetrain.communication.overdue import Issued
from drivetrain.errors import CommunicationError

logger = logging.getLogger("drivetrain.failure")

_NOTICE_PAUSES = (0.0, 0.1, 0.3, 0.6)
"""Seconds between looks for what broke a collective.

Errors are written before anything breaks; a process that dies closes its connections one by one.
"""

_LOOK_SECONDS = 1.0
"""How long to wait for a process that neither accepts nor refuses a connection."""

_ASKED = 64
"""Ranks that are asked at a time whether they live, so that a large job does not flood itself."""

_DIED = "died without an error of its own: it was killed, crashed, or left its script early"

_FAREWELL_SECONDS = 5.0
"""How long rank 0 stays for the others to read the cause, and a rank tries to say that it goes."""

_PARTING_SECONDS = 3.0
"""How long a rank that closes its job waits for the others to get there."""

_POLL_SECONDS = 0.02

_STORE_IS_GONE = (dist.DistError,)
"""What the store raises when the process that hosts it has died; nobody is left to tell then."""


@dataclass(frozen=True)
class Failure:
    """The first error of a job.

    Args:
        rank: the rank at fault; None if it is none of them.
        what: what became of it, such as ``"failed: ValueError: no more data"``.
    """

    rank: int | None
    what: str

    def __str__(self) -> str:
        return self.what if self.rank is None else f"rank {self.rank} {self.what}"


class FailureBoard:
    """Where the ranks of one job tell each other of a failure.

    Args:
        store: shared by all ranks; plugins may keep keys of their own under a prefix.
        rank: this rank.
        world_size: number of ranks.
    """

    def __init__(self, store: Store, rank: int, world_size: int) -> None:
        self.store = store
        self.issued: dict[tuple[int, ...], Issued] = {}
        self._rank = rank
        self._world_size = world_size
        self._acknowledged = False
        self._own = meeting.own_place()
        self._places: dict[int, pulse.Place] = {}
        # Each rank begins with the next one, so that all together ask everybody.
        self._others = deque((rank + 1 + i) % world_size for i in range(world_size - 1))
        self._looked = time.monotonic()
        store.set(f"place/{rank}", json.dumps(self._own))

    def learn_host(self) -> None:
        """Read where rank 0 listens: it may host the store, which goes with it."""
        with suppress(*_STORE_IS_GONE):
            self._learn([0])

    def record(self, error: BaseException) -> None:
        """Write ``error`` as the job's failure unless there is one already."""
        text = " ".join(f"{type(error).__name__}: {error}".split())
        failure = Failure(self._rank, f"failed: {text}")
        aside.within(_FAREWELL_SECONDS, lambda: self._write(failure))

    def announce(self, what: str) -> None:
        """Write that the job has failed by ``what``, unless there is a failure already.

        No rank is at fault alone, so every rank that waits for others raises it, this one too.
        """
        self._write(Failure(None, what))

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
            return Failure(notice["rank"], notice["what"])
        return self._without_store()

    def check(self, what: str) -> None:
        """For ranks that wait for others by themselves.

        Raises:
            CommunicationError: another rank has failed or died, which breaks off ``what``.
        """
        failure = self.first()
        if failure is None and time.monotonic() - self._looked > _LOOK_SECONDS:
            failure = self._look(_ASKED)
        if failure is not None and failure.rank != self._rank:
            raise CommunicationError(f"{what} was broken off because {failure}")

    def explain(self, what: str, error: BaseException) -> CommunicationError:
        """The exception to raise when ``what`` broke with torch's ``error``."""
        failure = None
        for pause in _NOTICE_PAUSES:
            time.sleep(pause)
            at_last = pause == _NOTICE_PAUSES[-1]
            failure = self.first() or self._look(self._world_size if at_last else _ASKED)
            if failure is not None:
                break
        if failure is not None and failure.rank != self._rank:
            return CommunicationError(f"{what} was broken off because {failure}")
        left: list[int] = []
        with suppress(*_STORE_IS_GONE):
            left = [rank for rank in range(self._world_size) if self._has("left", rank)]
        before = f"; rank {', '.join(map(str, left))} had closed the job before" if left else ""
        return CommunicationError(f"{broken(what, error)}{before}")

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
        """On rank 0, wait until all ranks that live know of the failure, but not for long."""
        deadline = time.monotonic() + _FAREWELL_SECONDS
        with suppress(*_STORE_IS_GONE):
            while self._rank == 0 and self.store.add("acknowledged", 0) < self._world_size:
                if time.monotonic() > deadline or self._all_informed():
                    return
                time.sleep(_POLL_SECONDS)

    def part(self, *, wait: bool) -> None:
        """Be counted, and wait until every rank is, one has failed, or some seconds have passed.

        A rank may be through with a collective that others still read. Closing a connection takes
        from it what the other end has not read yet, and breaks the collective there.
        """
        deadline, pause = time.monotonic() + _PARTING_SECONDS, 0.001
        with suppress(*_STORE_IS_GONE):
            if self.store.add("parting", 1) == self._world_size:
                self.store.set("parted", "")
            while wait and not self.store.check(["parted"]):
                if time.monotonic() > deadline or self.first() is not None:
                    return
                time.sleep(pause)
                pause = min(2 * pause, 0.1)

    def leave(self) -> None:
        """Say that this rank has closed its job, and needs to be told of nothing any more."""

        def say() -> None:
            with suppress(*_STORE_IS_GONE):
                self.store.set(f"left/{self._rank}", "")
                self._acknowledge()

        aside.within(_FAREWELL_SECONDS, say)  # a host that is cut off says nothing for long

    def _look(self, most: int) -> Failure | None:
        """Look for one of the next ``most`` ranks that died without an error; tell the others."""
        self._looked = time.monotonic()
        with suppress(*_STORE_IS_GONE):
            died = [rank for rank in self._ended(most) if not self._has("left", rank)]
            if died:
                self._write(Failure(died[0], _DIED))
                return self.first()
            return None
        return self._without_store()

    def _learn(self, ranks: Sequence[int]) -> None:
        """Read where other ranks listen."""
        for rank in ranks:
            if rank not in self._places and self._has("place", rank):
                address, port = json.loads(self.store.get(f"place/{rank}"))
                self._places[rank] = (address, port)

    def _ended(self, most: int) -> list[int]:
        """Those of the next ``most`` ranks whose processes have ended."""
        asked = list(self._others)[:most]
        self._others.rotate(-len(asked))
        self._learn(asked)
        places = {rank: self._places[rank] for rank in asked if rank in self._places}
        return pulse.ended(places, self._own, _LOOK_SECONDS)

    def _all_informed(self) -> bool:
        """True if every rank that does not know of the failure has ended."""
        now = time.monotonic()
        if now - self._looked < _LOOK_SECONDS:
            return False
        self._looked = now
        ended = self._ended(self._world_size)
        return all(self._has("knows", r) or r in ended for r in range(self._world_size))

    def _has(self, what: str, rank: int) -> bool:
        return bool(self.store.check([f"{what}/{rank}"]))

    def _without_store(self) -> Failure:
        """What can be said when the process that hosts the store has gone."""
        if meeting.agent_hosts_store():
            return Failure(None, f"{meeting.store_host()} is gone, with its store")
        if pulse.ended({0: self._places.get(0, pulse.NOWHERE)}, self._own, _LOOK_SECONDS):
            return Failure(0, _DIED)
        return Failure(0, "cannot be reached any more, nor the store that it hosts")

    def _write(self, failure: Failure) -> None:
        notice = json.dumps({"rank": failure.rank, "what": failure.what})
        with suppress(*_STORE_IS_GONE):
            self.store.compare_set("failure", "", notice)
            self._acknowledge()

    def _acknowledge(self) -> None:
        if not self._acknowledged:
            self._acknowledged = True
            self.store.set(f"knows/{self._rank}", "")
            self.store.add("acknowledged", 1)


def broken(what: str, error: BaseException) -> CommunicationError:
    """The exception to raise when nobody knows more than how ``what`` broke."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return CommunicationError(f"{what} failed: {lines[0]}")
