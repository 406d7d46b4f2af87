"""Several replicas behind one door: a request goes where its beginning is, or where least is to do.

A replica that has computed the beginning of a prompt keeps it in its cache, so sending the prompt
there saves the time to compute it, unless others wait there already.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable

from drivetrain_server.settings import Settings
from drivetrain_server.workers.exchange import Exchange
from drivetrain_server.workers.prefixes import keys_of
from drivetrain_server.workers.replica import Replica
from drivetrain_server.workers.shelf import Shelf
from drivetrain_server.workers.tickets import Part, RefusedError, Ticket, WorkerLostError
from drivetrain_server.workers.wire import Message

_SLACK = 4
"""Results that a replica may have more than the least loaded one, for one chunk it knows; more
chunks allow for more, up to ``_MOST_SLACK``."""

_MOST_SLACK = 32


class Router:
    """Chooses a replica for each request, and refuses what is too much.

    Args:
        settings: how many replicas, and how many results at once.
        heard: called with each part that arrives.

    Attributes:
        shelf: adapters that clients can choose.
        exchange: changes them.

    Raises:
        ConfigError: there is no such folder of adapters.
    """

    def __init__(self, settings: Settings, heard: Callable[[Part], None] = lambda _: None) -> None:
        self._settings, self._tell = settings, heard
        self.shelf = Shelf(settings.adapters, settings.name)
        self.exchange = Exchange(self.shelf)
        self.replicas = [
            Replica(index, settings, self._heard, self.shelf.paths, self.exchange.settle)
            for index in range(settings.replicas)
        ]
        self.exchange.replicas = self.replicas
        self._ended: deque[float] = deque(maxlen=64)

    @property
    def facts(self) -> Message:
        """What the first replica has said about the model."""
        return next((each.facts for each in self.replicas if each.facts), {})

    @property
    def load(self) -> int:
        """Results that wait or run."""
        return sum(replica.load for replica in self.replicas)

    @property
    def ready(self) -> bool:
        """Whether any replica takes requests."""
        return any(replica.ready for replica in self.replicas)

    async def started(self) -> None:
        """Wait until all replicas serve.

        Raises:
            ConfigError: the model cannot be served.
        """
        await asyncio.gather(*(replica.started() for replica in self.replicas))

    async def close(self) -> None:
        """End all workers."""
        await asyncio.gather(*(replica.close() for replica in self.replicas))

    def admit(self, results: int) -> None:
        """Refuse results for which there is no room.

        Raises:
            RefusedError: with status 429 for now, with 400 for ever.
        """
        most = self._settings.max_open
        if results > most:
            raise RefusedError(
                f"the request asks for {results} results, and this server makes {most} at once",
                400,
                "too_many_results",
            )
        if self.load + results > most:
            raise RefusedError(
                f"{self.load} results wait or run, and this server takes {most}; try again later",
                429,
                "queue_full",
            )

    def submit(self, order: Message, results: int) -> Ticket:
        """Send a request to a replica.

        Raises:
            WorkerLostError: no replica takes requests.
        """
        ready = [replica for replica in self.replicas if replica.ready]
        if not ready:
            names = ", ".join(f"{each.name} {each.trouble}" for each in self.replicas)
            raise WorkerLostError(f"no worker serves at present, they are started again: {names}")
        keys = keys_of(order["prompt"]) if len(ready) > 1 and "prompt" in order else []
        if adapter := order.get("sampling", {}).get("adapter", ""):
            keys = [adapter.encode() + key for key in keys]
        chosen = self._chosen(ready, keys)
        chosen.prefixes.remember(keys)
        return chosen.submit(order, results)

    def retry_after(self) -> int:
        """Seconds after which there may be room, from how fast results ended lately."""
        if len(self._ended) < 2:
            return 1
        each = (time.monotonic() - self._ended[0]) / len(self._ended)
        return max(1, min(60, round(each * max(1, self.load // 8))))

    def _heard(self, part: Part) -> None:
        if part.reason is not None:
            self._ended.append(time.monotonic())
        self._tell(part)

    @staticmethod
    def _chosen(ready: list[Replica], keys: list[bytes]) -> Replica:
        least = min(replica.load for replica in ready)

        def worth(replica: Replica) -> tuple[int, int]:
            known = replica.prefixes.matched(keys)
            slack = min(_SLACK * known, _MOST_SLACK)
            return (known if replica.load <= least + slack else 0, -replica.load)

        return max(ready, key=worth)
