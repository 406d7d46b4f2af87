"""One worker process from the server's side: started, watched, and started again."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
import sys
import time
from collections.abc import Callable, Coroutine, Mapping
from itertools import count

from drivetrain.errors import ConfigError
from drivetrain_server.settings import Settings
from drivetrain_server.workers.prefixes import Prefixes
from drivetrain_server.workers.tickets import Part, RefusedError, Ticket, WorkerLostError
from drivetrain_server.workers.wire import Message, packed, receive

logger = logging.getLogger("drivetrain.server")

_BACKOFF = (0.0, 1.0, 2.0, 5.0, 10.0, 30.0)
"""Seconds before a worker that has died again, and again, is started again."""

_GRACE = 5.0
"""Seconds that a worker has to end by itself."""


Settle = Callable[["Replica", Mapping[str, str], object], Coroutine[None, None, None]]


class Replica:
    """Keeps one worker alive and carries requests to it.

    Args:
        index: number of the replica.
        settings: what it serves, and how long it may be silent.
        heard: called with each part that arrives.
        adapters: folders by name that a worker loads when it starts; may change.
        settle: called when a worker has loaded, with the adapters that it could not load, and why;
            calls :meth:`open`.

    Attributes:
        missed: names of adapters that have changed since the worker was started.
    """

    def __init__(
        self,
        index: int,
        settings: Settings,
        heard: Callable[[Part], None] = lambda _: None,
        adapters: Mapping[str, str] | None = None,
        settle: Settle | None = None,
    ) -> None:
        self._adapters = {} if adapters is None else adapters
        self._settle, self._settling = settle, set[asyncio.Task[None]]()
        self.missed: set[str] = set()
        self.index, self._settings, self._heard = index, settings, heard
        self.prefixes = Prefixes()
        self.facts: Message = {}
        self.status: dict[str, float] = {}
        self.restarts, self.trouble = 0, ""
        self._tickets: dict[int, Ticket] = {}
        self._numbers = count()
        self._process: asyncio.subprocess.Process | None = None
        self._writer: asyncio.StreamWriter | None = None
        self._ready = asyncio.Event()
        self._first: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._closing = False
        self._heard_at = 0.0
        self._life = asyncio.create_task(self._live(), name=f"replica {index}")

    @property
    def ready(self) -> bool:
        """Whether it takes requests."""
        return self._ready.is_set()

    @property
    def load(self) -> int:
        """Results that wait or run."""
        return sum(ticket.results for ticket in self._tickets.values())

    @property
    def name(self) -> str:
        """How messages call it."""
        process = self._process
        return f"worker {self.index}" + (f" (process {process.pid})" if process else "")

    async def started(self) -> None:
        """Wait until the worker serves for the first time.

        Raises:
            ConfigError: the model cannot be served.
        """
        await asyncio.shield(self._first)

    def submit(self, order: Message, results: int) -> Ticket:
        """Send a request.

        Raises:
            WorkerLostError: the worker is being started.
        """
        if not self.ready:
            raise WorkerLostError(f"{self.name} is being started again; try again soon")
        return self.tell(order, results)

    def tell(self, order: Message, results: int = 0) -> Ticket:
        """Send an order, to a worker that does not serve yet, too.

        Raises:
            WorkerLostError: there is no worker.
        """
        if self._writer is None:
            raise WorkerLostError(f"{self.name} is being started again; try again soon")
        key = next(self._numbers)
        ticket = Ticket({"do": "add", **order, "id": key}, results, self._leave)
        self._tickets[key] = ticket
        self._send(ticket.order)
        return ticket

    @property
    def life(self) -> object | None:
        """What stands for the process that there is now; ``None``: there is none."""
        return self._writer

    def open(self, life: object) -> None:
        """Take requests from now on, for the process that ``life`` stands for.

        Raises:
            WorkerLostError: it has died.
        """
        if self._writer is None or self._writer is not life:
            raise WorkerLostError(f"{self.name} is being started again")
        self._ready.set()
        if not self._first.done():
            self._first.set_result(None)
        logger.info("%s serves", self.name)

    async def close(self) -> None:
        """End the worker; requests that run fail."""
        self._closing = True
        for task in self._settling:
            task.cancel()
        self._send({"do": "close"})
        process = self._process
        if process is not None:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(process.wait(), _GRACE)
            self._kill()
            with contextlib.suppress(TimeoutError):  # only the system can keep it alive now
                await asyncio.wait_for(process.wait(), _GRACE)
        self._life.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._life
        self._fail_all("the server was stopped")

    # -- inside ---------------------------------------------------------------------------------

    async def _live(self) -> None:
        attempts = 0
        while not self._is_closing():
            began = time.monotonic()
            try:
                reason, final = await self._serve_once()
            except OSError as error:
                reason, final = f"could not be started: {error}", False
            finally:
                self._ready.clear()
                self._kill()
            if self._is_closing():
                return
            self.trouble = reason
            if not self._first.done():
                kind = ConfigError if final else WorkerLostError
                self._first.set_exception(kind(f"{self.name} {reason}" if not final else reason))
                return
            self.restarts += 1
            attempts = 0 if time.monotonic() - began > 60 else attempts + 1
            wait = _BACKOFF[min(attempts, len(_BACKOFF)) - 1] if attempts else 0.0
            logger.error("%s %s; it is started again in %.0f s", self.name, reason, wait)
            self._fail_all(reason)
            await asyncio.sleep(wait)

    def _is_closing(self) -> bool:
        return self._closing

    async def _serve_once(self) -> tuple[str, bool]:
        """Run one process; why it has ended, and whether starting again is of no use."""
        reader = await self._spawn()
        watch = asyncio.create_task(self._watch())
        self._heard_at = time.monotonic()
        why, final = "", False
        try:
            while (message := await receive(reader)) is not None:
                self._heard_at = time.monotonic()
                if message["is"] == "failed":
                    why, final = message["message"], message["final"]
                else:
                    self._take(message)
        finally:
            watch.cancel()
        assert self._process is not None
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._process.wait(), _GRACE)
        if watch.done() and not watch.cancelled() and watch.exception() is None:
            why = watch.result()
        return why or _ending(self._process.returncode), final

    async def _spawn(self) -> asyncio.StreamReader:
        ours, theirs = socket.socketpair()
        try:
            self._process = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "drivetrain_server.workers.worker", str(theirs.fileno()),
                pass_fds=(theirs.fileno(),), stdin=asyncio.subprocess.DEVNULL,
                start_new_session=True,
            )  # fmt: skip
            reader, self._writer = await asyncio.open_connection(sock=ours)
        except BaseException:
            ours.close()
            raise
        finally:
            theirs.close()
        settings = self._settings
        self.missed.clear()
        self._send(
            {
                "do": "load",
                "model": settings.model,
                "engine": settings.engine,
                "config": settings.config,
                "dtype": settings.dtype,
                "weights": settings.weights,
                "threads": settings.threads,
                "ranks": settings.ranks,
                "adapters": dict(self._adapters),
                "strict": not self._first.done(),
            }
        )
        return reader

    async def _watch(self) -> str:
        """Ask the worker how it is; end it and return why when it says nothing any more."""
        while True:
            await asyncio.sleep(1.0)
            if not self.ready:
                self._heard_at = time.monotonic()  # loading takes as long as it takes
                continue
            self._send({"do": "ping"})
            silent = time.monotonic() - self._heard_at
            step = self.status.get("step_seconds", 0.0)
            if silent > self._settings.silence_seconds:
                reason = f"has said nothing for {silent:.0f} s and was ended"
            elif step > self._settings.step_seconds:
                reason = f"has computed one step for {step:.0f} s and was ended"
            else:
                continue
            self._kill()
            return reason

    def _take(self, message: Message) -> None:
        kind = message["is"]
        if kind == "progress":
            for key, index, text, tokens, reason, cached, places in message["items"]:
                known = () if places is None else (places,)
                self._add(key, Part(index, text, tokens, reason, cached, known))
        elif kind == "pong":
            self.status = {name: value for name, value in message.items() if name != "is"}
        elif kind == "ready":
            self.facts, self.trouble = message, ""
            self.prefixes.forget()
            if self._settle is None:
                self.open(self._writer)
            else:
                failed = message.get("failed", {})
                task = asyncio.create_task(self._settled(failed, self._writer))
                self._settling.add(task)
                task.add_done_callback(self._settling.discard)
        elif (ticket := self._tickets.get(message["id"])) is None:
            pass  # whoever asked has left
        elif kind == "refused":
            ticket.fail(RefusedError(message["message"], message["status"], message["code"]))
        else:
            ticket.begin(message["prompt_tokens"])
            if kind == "embedded":
                self._add(message["id"], Part(0, message["vectors"], 0, "stop", 0))

    async def _settled(self, failed: Mapping[str, str], life: object) -> None:
        assert self._settle is not None
        with contextlib.suppress(WorkerLostError):  # the next one settles
            await self._settle(self, failed, life)

    def _add(self, key: int, part: Part) -> None:
        ticket = self._tickets.get(key)
        if ticket is not None:
            self._heard(part)
            ticket.add(part)

    def _leave(self, ticket: Ticket, known: bool) -> None:
        key = ticket.order["id"]
        if self._tickets.pop(key, None) is not None and not known:
            self._send({"do": "cancel", "id": key})

    def _fail_all(self, reason: str) -> None:
        for ticket in list(self._tickets.values()):
            ticket.fail(WorkerLostError(f"{self.name} {reason}"))
        self._tickets.clear()
        self.status = {}

    def _send(self, message: Message) -> None:
        if self._writer is not None and not self._writer.is_closing():
            self._writer.write(packed(message))

    def _kill(self) -> None:
        if self._writer is not None:
            self._writer.close()
            self._writer = None
        if self._process is not None and self._process.returncode is None:
            with contextlib.suppress(ProcessLookupError):
                self._process.kill()


def _ending(code: int | None) -> str:
    if code is None:
        return "closed its connection"
    if code < 0:
        with contextlib.suppress(ValueError):
            return f"was ended by {signal.Signals(-code).name}"
    return f"ended with status {code}"


__all__ = ["Replica", "WorkerLostError"]
