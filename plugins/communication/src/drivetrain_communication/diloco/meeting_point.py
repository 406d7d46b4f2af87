"""The meeting point: a small server that all replicas can reach, and their way to it.

Messages are lines of JSON. What replicas exchange does not pass through here; beside the server
lies a store of torch, where the process groups of exchanges find each other.
"""

from __future__ import annotations

import asyncio
import json
import logging
import socket
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import timedelta
from typing import Any

import torch.distributed as dist
from torch.distributed.distributed_c10d import Store

from drivetrain.errors import CommunicationError
from drivetrain_communication.diloco.coordinator import Coordinator

logger = logging.getLogger("drivetrain.diloco")

WORDS_SECONDS = 30.0
"""How often a replica that waits is told for whom."""

_LOOK_SECONDS, _LOOKS = 0.1, 30
"""How often it is looked, and how many times, whether a replica that comes again has gone."""

_LONGEST = 1 << 20
"""Bytes of a line."""

_KEEPALIVE = {"TCP_KEEPIDLE": 5, "TCP_KEEPINTVL": 2, "TCP_KEEPCNT": 4}
"""After 13 seconds without any answer of the other host a connection counts as broken."""


class MeetingPoint:
    """The server; :meth:`serve` runs until it is cancelled.

    Args:
        host: name or address to listen at.
        port: 0 for a free one.
        say: told what happens, a line each.

    Raises:
        OSError: it cannot listen there.
    """

    def __init__(self, host: str, port: int, say: Callable[[str], None]) -> None:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        self._socket = socket.create_server((host, port), family=family, backlog=1024)
        address = self._socket.getsockname()
        self.host, self.port = host, int(address[1])
        with socket.create_server((host, 0), family=family, backlog=1024) as listener:
            port = int(listener.getsockname()[1])
            self._store = dist.TCPStore(  # type: ignore[attr-defined]
                host,
                port,
                is_master=True,
                wait_for_workers=False,
                master_listen_fd=listener.detach(),
            )
        self._coordinator = Coordinator(say)

    async def serve(self) -> None:
        """Answer replicas."""
        server = await asyncio.start_server(self._meet, sock=self._socket, limit=_LONGEST)
        async with server:
            await server.serve_forever()

    async def _meet(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve one connection."""
        _keep_alive(writer.get_extra_info("socket"))
        replica: int | None = None
        words: asyncio.Task[None] | None = None
        why = "ended without a word"
        try:
            while line := await reader.readline():
                message = json.loads(line)
                if message["do"] == "come":
                    await self._let_go_of(int(message["replica"]))
                    _send(writer, {"do": "welcome", "store": self._store.port})
                    came = self._coordinator.come(
                        int(message["replica"]),
                        int(message["step"]),
                        dict(message["facts"]),
                        lambda answer: _send(writer, answer),
                    )
                    if not came:
                        break
                    replica = int(message["replica"])
                    words = asyncio.create_task(self._keep_saying(replica, writer))
                elif replica is None:
                    break
                elif message["do"] == "ask":
                    self._coordinator.ask(replica, int(message["step"]), int(message["fragment"]))
                elif message["do"] == "answer":
                    self._coordinator.answer(replica, bool(message["succeeded"]))
                else:
                    why = "left"
                    break
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = f"is cut off ({type(error).__name__}: {error})"
        finally:
            if words is not None:
                words.cancel()
            if replica is not None:
                self._coordinator.gone(replica, why)
            with suppress(OSError):
                await writer.drain()
            writer.close()

    async def _let_go_of(self, replica: int) -> None:
        """Wait until the end of a job shows, which may be later than its successor comes."""
        for _ in range(_LOOKS):
            if not self._coordinator.has(replica):
                break
            await asyncio.sleep(_LOOK_SECONDS)

    async def _keep_saying(self, replica: int, writer: asyncio.StreamWriter) -> None:
        """Tell a replica that waits for whom it does."""
        while True:
            await asyncio.sleep(WORDS_SECONDS)
            if self._coordinator.is_waiting(replica):
                _send(writer, {"do": "wait", "for": self._coordinator.waiting_for()})


class Visitor:
    """One replica's connection to the meeting point. Blocking; for one thread at a time.

    Args:
        where: host and port.
        patience: seconds to try.

    Raises:
        CommunicationError: nobody answers there.
    """

    def __init__(self, where: tuple[str, int], patience: float) -> None:
        self._where = f"{where[0]}:{where[1]}"
        deadline, said = time.monotonic() + patience, False
        while True:
            try:
                self._socket = socket.create_connection(where, timeout=min(patience, 10.0))
                break
            except OSError as error:
                if time.monotonic() > deadline:
                    raise CommunicationError(
                        f"no meeting point of replicas answers at {self._where} ({error}); start "
                        "`drivetrain replicas meet` there, or see diloco.meeting_point"
                    ) from None
                if not said:
                    logger.warning("waiting for the meeting point at %s (%s)", self._where, error)
                said = True
                time.sleep(0.2)
        self._socket.settimeout(None)
        _keep_alive(self._socket)
        self._lines = self._socket.makefile("rb")
        self.address = str(self._socket.getsockname()[0])
        """Numeric address of this host on the way there."""

    def come(self, replica: int, step: int, facts: Mapping[str, Any]) -> int:
        """Take part; returns the port of the store."""
        self._write({"do": "come", "replica": replica, "step": step, "facts": dict(facts)})
        return int(self._read("welcome")["store"])

    def ask(self, step: int, fragment: int) -> None:
        """Ask for a round."""
        self._write({"do": "ask", "step": step, "fragment": fragment})

    def record(self) -> dict[str, Any]:
        """Wait for the exchange that was asked for to begin."""
        return self._read("exchange")

    def answer(self, succeeded: bool) -> bool:
        """Say how an exchange ended here; returns whether it counts."""
        self._write({"do": "answer", "succeeded": succeeded})
        return bool(self._read("decision")["commit"])

    def leave(self) -> None:
        """Say goodbye, if there is still somebody."""
        with suppress(CommunicationError, OSError):
            self._write({"do": "leave"})
        # A thread may wait for a line; closing alone would wait for it.
        with suppress(OSError):
            self._socket.shutdown(socket.SHUT_RDWR)
        self._socket.close()

    def _write(self, message: Mapping[str, Any]) -> None:
        try:
            self._socket.sendall(json.dumps(message).encode() + b"\n")
        except OSError as error:
            raise self._gone(str(error)) from None

    def _read(self, wanted: str) -> dict[str, Any]:
        while True:
            try:
                line = self._lines.readline(_LONGEST)
            except (OSError, ValueError) as error:
                raise self._gone(str(error)) from None
            if not line:
                raise self._gone("it closed the connection")
            message: dict[str, Any] = json.loads(line)
            if message["do"] == "refuse":
                raise CommunicationError(f"the meeting point at {self._where}: {message['why']}")
            if message["do"] == wanted:
                return message
            if message["do"] == "wait" and wanted != "welcome":
                logger.warning("waiting for replica %s", message["for"])

    def _gone(self, why: str) -> CommunicationError:
        return CommunicationError(
            f"lost the meeting point of replicas at {self._where} ({why}); start it again and "
            "resume all replicas from their last checkpoints"
        )


def store_at(host: str, port: int, patience: float) -> Store:
    """A connection of its own to the store beside the meeting point."""
    store: Store = dist.TCPStore(  # type: ignore[attr-defined]
        host, port, is_master=False, wait_for_workers=False, timeout=timedelta(seconds=patience)
    )
    return store


def _keep_alive(connection: Any) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _KEEPALIVE.items():
        if hasattr(socket, name):
            connection.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)


def _send(writer: asyncio.StreamWriter, message: Mapping[str, Any]) -> None:
    if not writer.is_closing():
        writer.write(json.dumps(message).encode() + b"\n")
