"""The thread that tells other ranks what this one does, and finds out who is missing.

All of it goes through the job's store, beside the collectives themselves:

1. Every rank writes twice a second how many collectives it has issued on each group, their digest,
   what it waits for, where it is, and for how long it has stood still.
2. It compares the digest with that of another rank, each time the next one, and where it waits
   looks for those that have not come (``rules``).
3. Digests that differ raise the alarm. Both ranks then write their histories, from which the first
   difference is read (``divergence``).
4. What is found is written where the job's failures are. Ranks that wait for others look there,
   whatever carries their data; a rank that does something else is interrupted by a signal.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import TYPE_CHECKING, Any, NamedTuple

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from drivetrain.errors import CommunicationError
from drivetrain_watchdog import divergence
from drivetrain_watchdog.history import History, Words, members
from drivetrain_watchdog.interruption import Interruption
from drivetrain_watchdog.rules import Record, find_cause
from drivetrain_watchdog.whereabouts import Whereabouts, state_of

if TYPE_CHECKING:
    from drivetrain.communication.failure import FailureBoard
    from drivetrain.job.job import Job

logger = logging.getLogger("drivetrain.watchdog")

_LOOK_SECONDS = 0.5
"""Between two looks; more in a job of more than 256 ranks, whose store has to serve them all."""

_LONG_SECONDS = 1.0
"""How long a rank waits before it looks for those that are missing."""

_SAY_SECONDS = 10.0
"""How long it waits before it says for whom, where that may be no error; then it doubles."""

_SILENT_SECONDS = 2.0
"""How long a rank writes nothing before it counts as stopped, where its process is."""

_STOPPED_LOOKS = 2
"""Looks in a row in which a process is seen stopped before that is told."""

_EXPLAIN_SECONDS = 4.0
"""How long a rank whose collective has broken looks for the reason."""

_TOLD_AHEAD = 64
"""Collectives of a new kind that a rank tells of before it issues them, and then one a second."""

_COMPARED = 8
"""Ranks whose histories are asked for, to see which of them is the odd one."""

_READ_AT_ONCE = 64
_READ_OF_MANY = 8

_STORE_IS_GONE = (dist.DistError,)


class Wait(NamedTuple):
    """What a rank waits in.

    Args:
        number: of its text.
        where: the module that was running.
        needs: name of a group or of messages -> how many must have been issued by its ranks.
        exact: whether it waits for all of them; else some may not be needed.
    """

    number: int
    where: str
    needs: dict[str, int]
    exact: bool


class _Suspicion(NamedTuple):
    """That ranks of a group part.

    Args:
        peer: whose digest was another one.
        place: of the collective that it had come to.
        since: when this was seen.
    """

    peer: int
    place: int
    since: float


class Watch:
    """Compares this rank with others, until it is closed.

    Args:
        job: the job; its thread is the one that makes this.
        where: where this rank is.
        patience: seconds for which a rank that others wait for may stand still; 0 for ever.

    Attributes:
        words: the texts of collectives.
        verdict: why the job has failed, once that is known.
    """

    def __init__(self, job: Job, where: Whereabouts, patience: float) -> None:
        assert job.failures is not None
        self.words = Words()
        self.where = where
        self.verdict: str | None = None
        self._job = job
        self._board: FailureBoard = job.failures
        self._store: Store = PrefixStore("watchdog", job.failures.store)
        self._rank, self._world_size = job.rank, job.world_size
        self._patience = patience
        self._histories: dict[str, History] = {}
        self._waits: dict[int, tuple[Wait, float]] = {}
        self._thread_of_job = threading.get_ident()
        self._beat, self._alarms, self._turn = 0, 0, 0
        self._texts_told, self._ahead, self._told_at = 0, float(_TOLD_AHEAD), time.monotonic()
        self._suspicions: dict[str, _Suspicion] = {}
        self._beats: dict[int, tuple[int, float]] = {}
        self._stopped: dict[int, int] = {}
        self._suspect: int | None = None
        self._say_at = _SAY_SECONDS
        self._raised = self._closing = False
        self._looking = threading.Lock()
        self._handler = Interruption(self._interrupted)
        self._end = threading.Event()
        self._interval = max(_LOOK_SECONDS, job.world_size / 512)
        self._thread = threading.Thread(target=self._run, name="drivetrain-watchdog", daemon=True)
        self._thread.start()

    # -- what the communicator tells -------------------------------------------------------------

    def history(self, name: str) -> History:
        """The history of a group, or of messages from one rank to another."""
        if name not in self._histories:
            self._histories[name] = History(self.words)
        return self._histories[name]

    def begin(self, wait: Wait) -> None:
        """This thread waits from now on."""
        self._waits[threading.get_ident()] = wait, time.monotonic()

    def tell_ahead(self) -> None:
        """Tell of a collective that this rank is about to issue, if none like it has been.

        gloo ends the process of a rank that gets more bytes than it expects; then the others still
        know what it was about to do. Where every collective has another shape, few are told.
        """
        if len(self.words.texts) == self._texts_told:
            return
        self._texts_told = len(self.words.texts)
        now = time.monotonic()
        self._ahead, self._told_at = min(self._ahead + now - self._told_at, _TOLD_AHEAD), now
        if self._ahead < 1:
            return
        self._ahead -= 1
        with suppress(*_STORE_IS_GONE), self._looking:
            self._publish()
            self._publish_histories()

    def end(self) -> None:
        """This thread waits no more."""
        self._waits.pop(threading.get_ident(), None)

    def refuse(self) -> None:
        """Refuse to issue anything once the job has failed.

        Raises:
            CommunicationError: why.
        """
        if self.verdict is not None:
            self._raised = True
            raise CommunicationError(self.verdict)

    def explain(self, error: CommunicationError, wait: Wait) -> CommunicationError:
        """The exception for a collective that broke, with what other ranks did, if it explains it.

        Args:
            error: how it broke.
            wait: what was waited for.
        """
        deadline = time.monotonic() + _EXPLAIN_SECONDS
        difference = None
        with suppress(*_STORE_IS_GONE):
            while self.verdict is None and time.monotonic() < deadline:
                with self._looking:
                    self._look_once(force=True)
                failure = self._board.first()
                if failure is not None:
                    difference = self._difference_with(failure.rank)
                    break
                if self._agrees(wait):
                    break
                time.sleep(0.1)
        self._raised = True
        if self.verdict is not None:
            return CommunicationError(self.verdict)
        if difference is not None:
            return CommunicationError(f"{difference}; {error}")
        where = f" ({wait.where})" if wait.where else ""
        return CommunicationError(f"{error}; rank {self._rank} was at {self.where.line()}{where}")

    def close(self) -> None:
        """End the thread, and tell the others that this rank issues nothing any more."""
        if self._closing:
            return
        self._closing = True
        self._end.set()
        self._thread.join(timeout=5.0)
        self._handler.restore()

    # -- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        with suppress(*_STORE_IS_GONE):  # its host has gone; core names it where ranks meet
            while not self._end.wait(self._interval):
                with self._looking:
                    self._look_once()
                self._interrupt()
            if self._job.failures is not None:  # a job that fails has said so by itself
                self._publish(left=True)

    def _look_once(self, *, force: bool = False) -> None:
        alarms = self._store.add("alarms", 0)
        if alarms != self._alarms:
            self._alarms = alarms
            self._publish_histories()
            failure = self._board.first()
            if failure is not None and failure.rank is None:
                self.verdict = failure.what
        self._publish()
        self._witness()
        if self.verdict is not None:
            return
        wait = self._longest_wait(0.0 if force else _LONG_SECONDS)
        records: dict[int, Record | None] = {}
        for peer in self._compared_next(wait):
            self._compare(peer, self._record_of(peer, records))
        self._follow_suspicions()
        if wait is not None and self.verdict is None:
            self._judge(wait, records)
        elif wait is None:
            self._suspect, self._say_at = None, _SAY_SECONDS

    # -- telling ---------------------------------------------------------------------------------

    def record(self, *, left: bool = False) -> dict[str, Any]:
        """What this rank writes of itself."""
        lines = {name: history.last for name, history in list(self._histories.items())}
        wait = self._longest_wait(0.0)
        texts = self.words.texts
        return {
            "beat": self._beat,
            "pid": os.getpid(),
            "step": self.where.steps,
            "lines": {name: [last.place, last.digest] for name, last in lines.items()},
            "last": {n: texts[e.number] for n, e in lines.items() if e.place} if left else {},
            "wait": None
            if wait is None
            else {
                "what": texts[wait.number],
                "where": wait.where,
                "needs": wait.needs,
                "exact": wait.exact,
            },
            "where": self.where.now,
            "at": self.where.line(),
            "still": self.where.still(),
            "caught": self.where.caught,
            "left": left,
        }

    def _publish(self, *, left: bool = False) -> None:
        self._beat += 1
        self._store.set(f"rank/{self._rank}", json.dumps(self.record(left=left)))

    def _publish_histories(self) -> None:
        stories = {}
        for name, history in list(self._histories.items()):
            entries = history.recent()
            numbers: dict[int, int] = {}
            places: dict[str, int] = {}
            stories[name] = {
                "first": entries[0].place if entries else 1,
                "texts": [numbers.setdefault(e.number, len(numbers)) for e in entries],
                "wheres": [places.setdefault(e.where, len(places)) for e in entries],
                "words": [self.words.texts[number] for number in numbers],
                "places": list(places),
            }
        self._store.set(f"history/{self._rank}", json.dumps(stories))

    def _witness(self) -> None:
        """Tell if the process of the next rank on this host is stopped, for ranks elsewhere."""
        ranks = self._job.ranks
        first = ranks.rank - ranks.local_rank
        peer = first + (ranks.local_rank + 1) % ranks.ranks_on_host
        record = self._read(peer) if 0 <= peer < self._world_size and peer != self._rank else None
        if record is None:
            return
        stopped = state_of(str(record["pid"])) == "T"
        before = self._stopped.get(peer, 0)
        self._stopped[peer] = before + 1 if stopped else 0
        if self._stopped[peer] == _STOPPED_LOOKS:
            self._store.set(f"stopped/{peer}", "1")
        elif before >= _STOPPED_LOOKS and not stopped:
            self._store.delete_key(f"stopped/{peer}")

    # -- reading ---------------------------------------------------------------------------------

    def _read(self, peer: int) -> dict[str, Any] | None:
        key = f"rank/{peer}"
        if not self._store.check([key]):
            return None
        record: dict[str, Any] = json.loads(self._store.get(key))
        return record

    def _record_of(self, peer: int, records: dict[int, Record | None]) -> Record | None:
        """What a rank has written, with how long ago; read once in a look."""
        if peer in records:
            return records[peer]
        if len(records) >= self._most_reads():
            return None
        record = self._read(peer)
        if record is not None:
            now = time.monotonic()
            beat, since = self._beats.get(peer, (0, now))
            if record["beat"] != beat:
                since = now
            self._beats[peer] = record["beat"], since
            record["silent"] = now - since
            record["stopped"] = record["silent"] > _SILENT_SECONDS and self._store.check(
                [f"stopped/{peer}"]
            )
        records[peer] = record
        return record

    def _most_reads(self) -> int:
        return _READ_AT_ONCE if self._world_size <= _READ_AT_ONCE else _READ_OF_MANY

    def _compared_next(self, wait: Wait | None) -> list[int]:
        """The next rank to compare with: of those that are waited for, else of any group."""
        self._turn += 1
        names = list(wait.needs) if wait is not None else list(self._histories)
        if not names:
            return []
        peers = [rank for rank in members(names[self._turn % len(names)]) if rank != self._rank]
        return [peers[(self._rank + self._turn) % len(peers)]]

    def _order(self, at: int, peers: Sequence[int]) -> Iterable[int]:
        """Each rank begins elsewhere, and with whom it has suspected before."""
        start = (at + self._turn * _READ_OF_MANY) % len(peers)
        rotated = [*peers[start:], *peers[:start]]
        if at != self._rank:
            return rotated
        suspect = [peer for peer in peers if peer == self._suspect]
        return [*suspect, *(peer for peer in rotated if peer != self._suspect)]

    # -- finding out -----------------------------------------------------------------------------

    def _compare(self, peer: int, record: Record | None) -> None:
        for name, (count, digest) in (record["lines"] if record is not None else {}).items():
            entry = self._histories[name].at(count) if name in self._histories else None
            if entry is not None and entry.digest != digest and name not in self._suspicions:
                self._suspicions[name] = _Suspicion(peer, count, time.monotonic())
                self._publish_histories()
                self._alarms = self._store.add("alarms", 1)

    def _agrees(self, wait: Wait) -> bool:
        """True if all ranks have come to what is waited for, and by the same way."""
        for name, count in wait.needs.items():
            history = self._histories[name]
            for peer in list(members(name))[:_READ_AT_ONCE]:
                if peer == self._rank:
                    continue
                theirs, digest = (self._read(peer) or {}).get("lines", {}).get(name, (0, 0))
                entry = history.at(theirs)
                if theirs < count or entry is None or entry.digest != digest:
                    return False
        return True

    def _follow_suspicions(self) -> None:
        for name, (peer, place, since) in self._suspicions.items():
            ranks = [rank for rank in members(name) if rank != self._rank]
            asked = dict.fromkeys([peer, *ranks[:_COMPARED]])
            there = [rank for rank in asked if self._has_told(rank, name, place)]
            if peer not in there or (
                len(there) < len(asked) and time.monotonic() - since < 2 * self._interval
            ):
                continue
            self._announce(self._described(name, there))
            return

    def _has_told(self, rank: int, name: str, place: int) -> bool:
        """Whether the history that a rank has written goes so far.

        One that it wrote ahead of a new kind of collective, or for an earlier alarm, may not.
        """
        if not self._store.check([f"history/{rank}"]):
            return False
        story = json.loads(self._store.get(f"history/{rank}")).get(name)
        return story is not None and story["first"] + len(story["texts"]) > place

    def _difference_with(self, rank: int | None) -> str | None:
        """The first difference from what a rank that has died told before, if there is one."""
        if rank is None or rank == self._rank:
            return None
        record = self._read(rank)
        for name, (count, digest) in (record["lines"] if record is not None else {}).items():
            entry = self._histories[name].at(count) if name in self._histories else None
            told = self._store.check([f"history/{rank}"])
            if entry is not None and entry.digest != digest and told:
                return self._described(name, [rank])
        return None

    def _described(self, name: str, others: Sequence[int]) -> str:
        """How ``others``, whose histories are there, and this rank differ on a group."""
        self._publish_histories()
        found: dict[int, Any] = {}
        for rank in sorted([self._rank, *others]):
            stories = json.loads(self._store.get(f"history/{rank}"))
            if name in stories:
                found[rank] = stories[name]
        records = {rank: record for rank in found if (record := self._read(rank)) is not None}
        records[self._rank] = self.record()
        return divergence.describe(name, found, records)

    def _judge(self, wait: Wait, records: dict[int, Record | None]) -> None:
        own = {**self.record(), "stopped": False, "silent": 0.0}
        if own["wait"] is None or own["wait"]["needs"] != wait.needs:
            return  # it has gone on meanwhile
        cause = find_cause(
            self._rank,
            own,
            lambda peer: self._record_of(peer, records),
            self._patience,
            self._order,
        )
        if cause is None:
            return
        if cause.is_certain:
            self._announce(cause.text)
            return
        self._suspect = cause.rank
        waited = self._waited()
        if waited > self._say_at:
            self._say_at = 2 * waited
            logger.warning("%s; that may be slow and no error (waited %.0f s)", cause.text, waited)

    def _announce(self, verdict: str) -> None:
        self._board.announce(verdict)
        failure = self._board.first()
        if failure is not None and failure.rank is None:
            self.verdict = failure.what
        self._alarms = self._store.add("alarms", 1)

    def _longest_wait(self, seconds: float) -> Wait | None:
        """What this rank has waited for longest, if it has waited for so long."""
        found = min(list(self._waits.values()), key=lambda found: found[1], default=None)
        if found is None or time.monotonic() - found[1] < seconds:
            return None
        return found[0]

    def _waited(self) -> float:
        now = time.monotonic()
        return max((now - since for _, since in list(self._waits.values())), default=0.0)

    # -- a rank that does something else ---------------------------------------------------------

    def _interrupt(self) -> None:
        """Raise the verdict in the job's thread, unless it waits in a collective, which breaks."""
        if self.verdict is None or self._raised or self._thread_of_job in self._waits:
            return
        self._handler.send()

    def _interrupted(self) -> None:
        if self.verdict is not None and not self._raised and not self._closing:
            self._raised = True
            raise CommunicationError(self.verdict)
