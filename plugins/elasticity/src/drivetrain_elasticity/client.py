"""A worker's way to the keeper of its host."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

from drivetrain_elasticity.keeper import OWNER, PACKET, name_of, user_of

_START_SECONDS = 60.0
_POLL_SECONDS = 0.05


class KeeperError(OSError):
    """The keeper cannot be reached, or has refused."""


class Client:
    """A connection to the keeper of this process's agent, which is started if need be.

    Raises:
        KeeperError: the system has no memory files, or the keeper does not start.
    """

    def __init__(self) -> None:
        if not hasattr(os, "memfd_create") or not hasattr(os, "pidfd_open"):
            raise KeeperError("memory that outlives a process needs Linux")
        self._lock = threading.Lock()
        owner = owner_of_workers()
        self._socket = _connect(name_of(owner), lambda: _start(owner))

    def ask(self, what: str, file: int | None = None, **request: Any) -> tuple[Any, int | None]:
        """The answer to one request, and a descriptor, which is the caller's.

        Raises:
            KeeperError: the keeper is gone, or could not do it.
        """
        packet = json.dumps({"do": what, **request}).encode()
        with self._lock:
            try:
                socket.send_fds(self._socket, [packet], [] if file is None else [file])
                data, files, _, _ = socket.recv_fds(self._socket, PACKET, 1)
            except OSError as error:
                raise KeeperError(f"the keeper of memory checkpoints is gone: {error}") from error
        if not data:
            raise KeeperError("the keeper of memory checkpoints has ended")
        answer = json.loads(data)
        if isinstance(answer, dict):
            raise KeeperError(answer["error"])
        return answer, files[0] if files else None

    def close(self) -> None:
        """End the connection."""
        self._socket.close()


def owner_of_workers() -> int:
    """The process that restarts workers: torchrun's agent, or this one where there is none."""
    if OWNER in os.environ:
        return int(os.environ[OWNER])
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()


def _start(owner: int) -> None:
    command = [sys.executable, "-m", "drivetrain_elasticity.keeper", str(owner)]
    subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,  # an agent ends workers with all of their session
    )


def _connect(name: str, start: Callable[[], None]) -> socket.socket:
    deadline, started = time.monotonic() + _START_SECONDS, False
    while True:
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        try:
            connection.connect(name)
        except ConnectionRefusedError:
            connection.close()
            if time.monotonic() > deadline:
                raise KeeperError("the keeper of memory checkpoints does not start") from None
            if not started:
                start()
                started = True
            time.sleep(_POLL_SECONDS)
            continue
        if user_of(connection) != os.getuid():
            raise KeeperError("another user listens where the keeper should be")
        return connection
