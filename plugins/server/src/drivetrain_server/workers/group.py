"""The processes of one engine that several ranks compute together.

The first one talks to the server. Before each step it tells the others what it was told, and all of
them do the same: the engine decides everything from the calls that it gets, so ranks stay together.
"""

from __future__ import annotations

import logging
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Sequence
from typing import Any

from drivetrain.errors import DrivetrainError
from drivetrain_server.workers.wire import Message, Wire

RANKS_SECONDS = 2.0
"""How long an error waits for the news that another rank has ended."""

logger = logging.getLogger("drivetrain.server.worker")


class Group:
    """The other ranks, from the first one's side.

    Args:
        order: what each of them is to load.
        ranks: how many there are with this one.
        lost: called, in a thread, with what to tell the server when one of them has ended.
    """

    def __init__(self, order: Message, ranks: int, lost: Callable[[Message], None]) -> None:
        from torch.distributed import TCPStore  # type: ignore[attr-defined]

        self._lost, self._closing = lost, False
        # Ranks meet at it; it lives as long as this process. By itself it would listen on all
        # interfaces, whatever name it is given.
        listener = socket.create_server(("127.0.0.1", 0))
        self._store: Any = TCPStore(
            "127.0.0.1", listener.getsockname()[1], is_master=True, wait_for_workers=False,
            master_listen_fd=listener.detach(),
        )  # fmt: skip
        self._wires: list[Wire] = []
        self._watches: list[threading.Thread] = []
        for rank in range(1, ranks):
            self._start(rank, ranks, {**order, "follow": True})
        os.environ.update(self._place(0, ranks))

    def tell(self, orders: Sequence[Message], *, close: bool) -> None:
        """Have the others carry out ``orders`` and then compute a step, or end.

        Raises:
            DrivetrainError: one has ended, and why is not known.
        """
        self._closing = close
        for rank, wire in enumerate(self._wires, 1):
            self._send(rank, wire, {"orders": list(orders), "close": close})

    def _send(self, rank: int, wire: Wire, message: Message) -> None:
        try:
            wire.send(message)
        except OSError as error:
            self.wait(RANKS_SECONDS)  # who watches it knows why, and ends this process
            raise DrivetrainError(f"rank {rank} takes no orders any more: {error}") from error

    def wait(self, seconds: float) -> None:
        """Give ranks that have ended so long to be told of, which ends this process."""
        end = time.monotonic() + seconds
        for watch in self._watches:
            watch.join(max(0.0, end - time.monotonic()))

    def _place(self, rank: int, ranks: int) -> dict[str, str]:
        return {
            "RANK": str(rank),
            "WORLD_SIZE": str(ranks),
            "LOCAL_RANK": str(rank),
            "LOCAL_WORLD_SIZE": str(ranks),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(self._store.port),
            "TORCHELASTIC_USE_AGENT_STORE": "True",
        }

    def _start(self, rank: int, ranks: int, order: Message) -> None:
        ours, theirs = socket.socketpair()
        try:
            process = subprocess.Popen(
                [sys.executable, "-m", "drivetrain_server.workers.worker", str(theirs.fileno())],
                pass_fds=(theirs.fileno(),), stdin=subprocess.DEVNULL,
                env={**os.environ, **self._place(rank, ranks)},
            )  # fmt: skip
        finally:
            theirs.close()
        wire = Wire(ours)
        self._wires.append(wire)
        watch = threading.Thread(
            target=self._watch, args=(rank, process, wire), name=f"rank {rank}", daemon=True
        )
        watch.start()
        self._watches.append(watch)
        self._send(rank, wire, order)

    def _watch(self, rank: int, process: subprocess.Popen[bytes], wire: Wire) -> None:
        """Say that a rank has ended, with its own words if it has any."""
        while (message := wire.receive()) is not None:
            if message["is"] == "failed":
                text = f"rank {rank} (process {process.pid}): {message['message']}"
                self._lost({**message, "message": text})
                return
        code = process.wait()
        if not self._closing:
            how = f"by signal {-code}" if code < 0 else f"with status {code}"
            text = f"rank {rank} (process {process.pid}) has ended {how}"
            self._lost({"is": "failed", "message": text, "final": False})


class Silent:
    """The wire of a rank that has nothing to say to the server."""

    def send(self, message: Message) -> None:
        """Say nothing."""
