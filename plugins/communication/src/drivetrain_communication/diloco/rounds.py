"""One rank's way through a round, beside its training: who takes part, exchange, decision.

Rank 0 of a replica talks to the meeting point and tells the others, over the store of their job,
what it learns. Each rank exchanges with its counterparts in other replicas and votes; rank 0 counts
the votes. All that happens on a thread of its own and uses no collective of the job.
"""

from __future__ import annotations

import json
import logging
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from drivetrain.communication.network import route_to
from drivetrain.errors import CommunicationError
from drivetrain_communication.diloco.codecs import Codec
from drivetrain_communication.diloco.coordinator import FOUNDING
from drivetrain_communication.diloco.exchange import Exchange
from drivetrain_communication.diloco.meeting_point import Visitor, store_at

if TYPE_CHECKING:
    from torch.distributed.distributed_c10d import Store

    from drivetrain.job.job import Job

logger = logging.getLogger("drivetrain.diloco")

_POLL_SECONDS = 0.005
_MOST_POLL_SECONDS = 0.1


@dataclass(frozen=True)
class Outcome:
    """What a round has brought.

    Args:
        record: who took part, after how many steps, which fragment.
        mean: over the replicas that were in step, of how far they have come; ``None`` when the
            round was that of the founders.
        handed: the run's values for a replica that came; ``None`` where it has them.
    """

    record: dict[str, Any]
    mean: torch.Tensor | None
    handed: list[torch.Tensor] | None = None


class Rounds:
    """Carries out rounds for one rank.

    :attr:`sent_bytes` counts what this rank has sent to other replicas, and :attr:`members` are the
    replicas of the last round.

    Args:
        job: of this replica.
        replica: its number.
        where: host and port of the meeting point.
        patience: seconds to try to get there, and that nothing may arrive in an exchange.
    """

    def __init__(self, job: Job, replica: int, where: tuple[str, int], patience: float) -> None:
        self._job, self._replica, self._where, self._patience = job, replica, where, patience
        self._visitor: Visitor | None = None
        self._store_port = 0
        self._board = _Board(job)
        self.sent_bytes = 0
        self.members: tuple[int, ...] = ()

    def begin(
        self,
        step: int,
        fragment: int,
        facts: dict[str, Any],
        send: Callable[[int], tuple[torch.Tensor, Codec]],
        values: Sequence[torch.Tensor],
    ) -> Future[Outcome]:
        """Start a round; no rank of this replica may have another one under way.

        Args:
            step: inner steps done.
            fragment: the round's; :data:`FOUNDING` to come.
            facts: what all replicas must agree on; used to come.
            send: returns what this rank gives for a fragment, and how it travels.
            values: what newcomers need.
        """
        future: Future[Outcome] = Future()

        def run() -> None:
            try:
                future.set_result(self._round(step, fragment, facts, send, values))
            except BaseException as error:  # noqa: BLE001 - the training thread raises it
                future.set_exception(error)

        threading.Thread(target=run, name="drivetrain-diloco", daemon=True).start()
        return future

    def result(self, future: Future[Outcome]) -> Outcome:
        """Wait for a round, and for failures of this replica's ranks.

        Raises:
            CommunicationError: the meeting point refused or is gone; another rank failed.
        """
        while True:
            try:
                return future.result(timeout=0.2)
            except TimeoutError:
                if self._job.failures is not None:
                    self._job.failures.check("a round of diloco")

    def close(self) -> None:
        """Leave, as far as this rank has a connection to the meeting point."""
        if self._visitor is not None:
            self._visitor.leave()
            self._visitor = None

    def _round(
        self,
        step: int,
        fragment: int,
        facts: dict[str, Any],
        send: Callable[[int], tuple[torch.Tensor, Codec]],
        values: Sequence[torch.Tensor],
    ) -> Outcome:
        ask = partial(self._record, step, fragment, facts)
        while True:
            self._board.next_attempt()
            record = self._board.from_first("record", ask)
            outcome, fault = None, ""
            try:
                outcome = self._exchange(record, send, values)
            except (RuntimeError, dist.DistError) as error:
                fault = f"rank {self._job.rank}: {str(error).splitlines()[0]}"
            votes = self._board.to_first("vote", fault)
            decision = self._board.from_first("decision", partial(self._decide, votes))
            if decision["commit"]:
                assert outcome is not None
                self.members = tuple(record["members"])
                return outcome
            logger.warning(
                "an exchange with replicas %s failed; trying again without those that have ended"
                " (%s)",
                record["members"],
                "; ".join(decision["faults"]) or "no fault on this replica",
            )

    def _record(self, step: int, fragment: int, facts: dict[str, Any]) -> dict[str, Any]:
        """On rank 0: ask for a round and wait for it to begin."""
        if self._visitor is None:
            self._visitor = Visitor(self._where, self._patience)
            self._store_port = self._visitor.come(self._replica, step, facts)
        else:
            self._visitor.ask(step, fragment)
        return {**self._visitor.record(), "store": self._store_port}

    def _decide(self, votes: Callable[[], list[str]]) -> dict[str, Any]:
        """On rank 0: tell the meeting point how the exchange ended on all ranks."""
        assert self._visitor is not None
        faults = votes()
        return {"commit": self._visitor.answer(not any(faults)), "faults": [f for f in faults if f]}

    def _exchange(
        self,
        record: dict[str, Any],
        send: Callable[[int], tuple[torch.Tensor, Codec]],
        values: Sequence[torch.Tensor],
    ) -> Outcome:
        members, fragment = record["members"], record["fragment"]
        mean, codec = (None, None) if fragment == FOUNDING else send(fragment)
        handed = [value.clone() for value in values] if record["adopting"] else []
        # A rank that counts nothing as its own has counterparts that do not, either. Whoever
        # connected all the same might be gone before the others have.
        gives = mean is not None and mean.numel() > 0
        if len(members) > 1 and (gives or any(value.numel() for value in handed)):
            exchange = self._connect(record)
            if mean is not None and codec is not None:
                mean = exchange.mean(mean, codec, [members.index(r) for r in record["givers"]])
            exchange.hand_over(handed, members.index(record["source"]))
            self.sent_bytes += exchange.sent_bytes
        adopts = self._replica in record["adopting"] and record["source"] != self._replica
        return Outcome(record, mean, handed if adopts else None)

    def _connect(self, record: dict[str, Any]) -> Exchange:
        members, host = record["members"], self._where[0]
        meeting = store_at(host, int(record["store"]), self._patience)
        prefix = f"diloco/{record['generation']}/{self._job.rank}"
        route = route_to(host)
        return Exchange(
            PrefixStore(prefix, meeting),
            members.index(self._replica),
            len(members),
            route.own if route is not None else host,
            timedelta(seconds=self._patience),
        )


class _Board:
    """Words between the ranks of one replica, over the store of their job.

    Args:
        job: whose ranks they are.
    """

    def __init__(self, job: Job) -> None:
        self._rank, self._size = job.rank, job.world_size
        failures = job.failures
        self._store: Store | None = None if failures is None else failures.store
        self._attempt = 0

    def next_attempt(self) -> None:
        """Begin with new keys; those of the attempt before last are in nobody's way any more."""
        self._attempt += 1
        if self._store is not None and self._rank == 0:
            old = self._attempt - 2
            names = ["record", "decision", *(f"vote/{rank}" for rank in range(self._size))]
            for name in names if old > 0 else ():
                self._store.delete_key(f"diloco/{old}/{name}")

    def from_first(self, name: str, make: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        """What ``make`` returns on rank 0; an error there is raised on all."""
        if self._store is None:
            return make()
        key = self._key(name)
        if self._rank == 0:
            try:
                made = make()
            except BaseException as error:
                self._store.set(key, json.dumps({"error": str(error)}))
                raise
            self._store.set(key, json.dumps(made))
            return made
        told: dict[str, Any] = json.loads(self._wait(key))
        if "error" in told:
            raise CommunicationError(told["error"])
        return told

    def to_first(self, name: str, value: str) -> Callable[[], list[str]]:
        """Say ``value`` to rank 0; the answer returns there what all ranks have said."""
        store = self._store
        if store is None:
            return lambda: [value]
        store.set(self._key(f"{name}/{self._rank}"), json.dumps(value))
        keys = [self._key(f"{name}/{rank}") for rank in range(self._size)]
        return lambda: [json.loads(self._wait(key)) for key in keys]

    def _key(self, name: str) -> str:
        return f"diloco/{self._attempt}/{name}"

    def _wait(self, key: str) -> bytes:
        """The value of ``key``, without holding the store while it is not there."""
        assert self._store is not None
        pause = _POLL_SECONDS
        while not self._store.check([key]):
            time.sleep(pause)
            pause = min(1.5 * pause, _MOST_POLL_SECONDS)
        return bytes(self._store.get(key))
