"""A process beside the workers that keeps files in memory while workers are restarted.

It holds open descriptors of anonymous memory (memfd) that workers have written and passed to it,
and passes them back to those that ask. So it copies nothing, and when it ends nothing is left: no
file, no shared memory. It ends with the process that owns it, the agent that restarts workers.

Requests and answers are packets of JSON over a socket in the abstract namespace of Unix sockets;
both sides accept only processes of the same user.
"""

from __future__ import annotations

import json
import os
import selectors
import socket
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

OWNER = "DRIVETRAIN_KEEPER_OWNER"
"""Variable with the process that the keeper ends with, where it is not the parent of workers."""

_START_SECONDS = 60.0
_POLL_SECONDS = 0.05
_PACKET = 1 << 17


class KeeperError(OSError):
    """The keeper cannot be reached, or has refused."""


class Keeper:
    """The process: files by name.

    Args:
        listener: accepts workers.
        owner: a descriptor that becomes readable when the owner has ended.
    """

    def __init__(self, listener: socket.socket, owner: int) -> None:
        self._files: dict[str, int] = {}
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(owner, selectors.EVENT_READ, None)

    def serve(self) -> None:
        """Answer until the owner ends."""
        while True:
            for key, _ in self._selector.select():
                if key.data is None:
                    return
                key.data(key.fileobj)

    def _accept(self, listener: socket.socket) -> None:
        worker, _ = listener.accept()
        if _user_of(worker) == os.getuid():
            self._selector.register(worker, selectors.EVENT_READ, self._answer)
        else:
            worker.close()

    def _answer(self, worker: socket.socket) -> None:
        data, files, _, _ = b"", list[int](), 0, None
        with suppress(OSError):
            data, files, _, _ = socket.recv_fds(worker, _PACKET, 1)
        if not data:
            self._selector.unregister(worker)
            worker.close()
            return
        request = json.loads(data)
        answer, sent = self._do(request["do"], request["path"], files)
        with suppress(OSError):  # it has gone meanwhile
            socket.send_fds(worker, [json.dumps(answer).encode()], sent)

    def _do(self, what: str, path: str, files: list[int]) -> tuple[Any, list[int]]:
        if what == "put":
            self._remove(path)
            self._files[path] = files[0]
            return None, []
        if what == "get":
            found = [self._files[path]] if path in self._files else []
            return bool(found), found
        if what == "remove":
            self._remove(path)
            return None, []
        start = f"{path}/" if path else ""
        below = (name.removeprefix(start) for name in self._files if name.startswith(start))
        return sorted({name.partition("/")[0] for name in below}), []

    def _remove(self, path: str) -> None:
        if path in self._files:
            os.close(self._files.pop(path))


class Client:
    """A worker's connection to the keeper of its agent, which is started if need be.

    Raises:
        KeeperError: the system has no memory files, or the keeper does not start.
    """

    def __init__(self) -> None:
        if not hasattr(os, "memfd_create") or not hasattr(os, "pidfd_open"):
            raise KeeperError("memory that outlives a process needs Linux")
        self._lock = threading.Lock()
        owner = owner_of_workers()
        self._socket = _connect(_name(owner), lambda: _start(owner))

    def ask(self, what: str, path: str, file: int | None = None) -> tuple[Any, int | None]:
        """The answer to one request, and a descriptor, which is the caller's."""
        packet = json.dumps({"do": what, "path": path}).encode()
        with self._lock:
            try:
                socket.send_fds(self._socket, [packet], [] if file is None else [file])
                data, files, _, _ = socket.recv_fds(self._socket, _PACKET, 1)
            except OSError as error:
                raise KeeperError(f"the keeper of memory checkpoints is gone: {error}") from error
        if not data:
            raise KeeperError("the keeper of memory checkpoints has ended")
        return json.loads(data), files[0] if files else None


def owner_of_workers() -> int:
    """The process that restarts workers: torchrun's agent, or this one where there is none."""
    if OWNER in os.environ:
        return int(os.environ[OWNER])
    return os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()


def main() -> None:
    """Serve; ``sys.argv`` has the owner's process."""
    owner = int(sys.argv[1])
    try:
        watched = os.pidfd_open(owner)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(_name(owner))
    except OSError:  # the owner has gone, or another rank was faster
        return
    listener.listen(256)
    Keeper(listener, watched).serve()


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
        if _user_of(connection) != os.getuid():
            raise KeeperError("another user listens where the keeper should be")
        return connection


def _name(owner: int) -> str:
    """Where the keeper listens; the owner's start makes its number unique."""
    text = Path(f"/proc/{owner}/stat").read_text("utf-8", errors="replace")
    return f"\0drivetrain-keeper-{owner}-{text.rpartition(')')[2].split()[19]}"


def _user_of(connection: socket.socket) -> int:
    size = struct.calcsize("3i")
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return int(struct.unpack("3i", found)[1])


if __name__ == "__main__":
    main()
