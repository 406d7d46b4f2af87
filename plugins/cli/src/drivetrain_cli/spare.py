"""A warm spare: a process with torch imported, of which every rank of this machine is a copy.

    python -m drivetrain_cli.spare

Starting Python and importing torch takes seconds, and on a busy machine every rank takes them from
the others. The spare takes them once. When torchrun starts or restarts a rank, the small process
that it starts (:mod:`drivetrain_cli.warm_rank`) hands its streams, variables and arguments over;
the spare forks, and the copy is the rank. What the rank does and how it ends is passed on, so that
torchrun sees the small process do it.

The spare runs no operation of torch and has one thread, so that a copy of it is complete. It ends
with the agent, and its ranks with it.

Messages are packets of JSON over a socket in the abstract namespace; both sides accept only
processes of the same user:

1. the small process sends ``{"argv", "env", "cwd"}`` with its three standard streams;
2. the spare answers ``{"pid"}`` when the rank runs, and ``{"status"}``, as ``waitpid`` gives it,
   when it has ended. If the small process goes away, the rank is killed.
"""

from __future__ import annotations

import gc
import importlib
import json
import logging
import os
import secrets
import selectors
import signal
import socket
import struct
import subprocess
import sys
import threading
import time
from contextlib import suppress
from typing import Any

from drivetrain_cli import spare_modules

VARIABLE = "DRIVETRAIN_SPARE"
"""Where the spare of this run listens."""

PACKET = 1 << 20
"""Bytes that a message has at most: the environment of a process, mostly."""

LULL_SECONDS = 1.0
"""The spare loads what ranks need when they have told nothing for so long, as they need the
processors themselves while they start."""


def listener_at(name: str) -> socket.socket:
    """A socket of this machine that accepts connections under an abstract name."""
    found = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    found.bind(f"\0{name}")
    found.listen(256)
    found.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET)
    return found


def same_user(connection: socket.socket) -> bool:
    """True if a process of our own user is at the other end."""
    size = struct.calcsize("3i")
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return int(struct.unpack("3i", found)[1]) == os.getuid()


class Spare:
    """Answers requests for ranks until the agent ends.

    Args:
        listener: where they come.
        agent: a descriptor that becomes readable when the agent has ended.
    """

    def __init__(self, listener: socket.socket, agent: int) -> None:
        self._listener, self._agent = listener, agent
        self._selector = selectors.DefaultSelector()
        self._selector.register(listener, selectors.EVENT_READ, self._accept)
        self._selector.register(agent, selectors.EVENT_READ, None)
        self._ranks: dict[socket.socket, tuple[int, int]] = {}  # to process and its descriptor
        self._packages = spare_modules.packages()
        self._wanted: dict[str, dict[str, None]] = {}  # package -> modules that ranks looked for
        self._trying, self._told = False, 0.0

    def serve(self) -> tuple[dict[str, Any], list[int]] | None:
        """What to be, in a copy; ``None`` in the spare itself, when the agent has ended."""
        while True:
            for key, _ in self._selector.select(self._patience()):
                if key.data is None:
                    return None
                request = key.data(key.fileobj)
                if request is not None:
                    return request  # type: ignore[no-any-return]
            if self._patience() == 0:
                self._try_next()

    def _patience(self) -> float | None:
        """Seconds until there is something to load; ``None`` for: not before something is told."""
        if not self._wanted or self._trying:
            return None
        return max(0.0, self._told + LULL_SECONDS - time.monotonic())

    def _accept(self, listener: socket.socket) -> None:
        connection, _ = listener.accept()
        if same_user(connection):
            self._selector.register(connection, selectors.EVENT_READ, self._read)
        else:
            connection.close()

    def _read(self, connection: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
        """A request, in the copy that it makes; or the end of one who has asked."""
        data, streams = b"", list[int]()
        with suppress(OSError):
            data, streams, _, _ = socket.recv_fds(connection, PACKET, 3)
        if not data:
            if connection in self._ranks:
                send_signal(self._ranks[connection][0], signal.SIGKILL)
            self._selector.unregister(connection)
            if connection not in self._ranks:
                connection.close()
            return None
        heard, told = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        process = os.fork()
        if process == 0:
            os.setsid()
            self._let_go()
            heard.close()
            told.setblocking(False)
            sys.meta_path.insert(0, spare_modules.Reporter(told, self._packages))
            return json.loads(data), streams
        told.close()
        self._selector.register(heard, selectors.EVENT_READ, self._hear)
        for stream in streams:
            os.close(stream)
        ended = os.pidfd_open(process)
        self._ranks[connection] = process, ended
        self._selector.register(ended, selectors.EVENT_READ, lambda _: self._reap(connection))
        self._send(connection, {"pid": process})
        return None

    def _reap(self, connection: socket.socket) -> None:
        process, ended = self._ranks.pop(connection)
        self._selector.unregister(ended)
        os.close(ended)
        self._send(connection, {"status": os.waitpid(process, 0)[1]})
        with suppress(KeyError):  # who has asked is gone already
            self._selector.unregister(connection)
        connection.close()

    def _hear(self, heard: socket.socket) -> None:
        """Note the module that a rank looks for; or the end of that rank."""
        name = heard.recv(PACKET).decode()
        if not name:
            self._selector.unregister(heard)
            heard.close()
        elif name not in sys.modules:
            self._wanted.setdefault(name.partition(".")[0], {})[name] = None
            self._told = time.monotonic()

    def _try_next(self) -> None:
        """Have a copy import what ranks needed of one package, to see what comes of it."""
        names: list[str] = []
        while self._wanted and not names:
            names = spare_modules.missing(self._wanted.pop(next(iter(self._wanted))))
        if not names:
            return
        process = spare_modules.try_in_a_copy(names)
        ended = os.pidfd_open(process)
        self._trying = True

        def load(_: object) -> None:
            self._trying = False
            self._selector.unregister(ended)
            os.close(ended)
            if os.waitpid(process, 0)[1] == 0:
                spare_modules.load(names)
                gc.freeze()  # as before: what is new is shared, too

        self._selector.register(ended, selectors.EVENT_READ, load)

    def _let_go(self) -> None:
        """Close, in a copy, what belongs to the spare."""
        for key in list(self._selector.get_map().values()):
            os.close(key.fd) if isinstance(key.fileobj, int) else key.fileobj.close()  # type: ignore[attr-defined]
        self._selector.close()

    def _send(self, connection: socket.socket, message: dict[str, int]) -> None:
        with suppress(OSError):  # it has gone; its end is seen where connections are read
            connection.send(json.dumps(message).encode())


def send_signal(process: int, number: int) -> None:
    """Signal a rank and what it has started; by itself as long as it has no group of its own."""
    for send in (os.killpg, os.kill):
        with suppress(ProcessLookupError):
            send(process, number)
            return


class SpareStarter(threading.Thread):
    """Starts the spare of an agent, and another one where it has ended; runs in the agent.

    A spare that ends at once a few times is given up: ranks then start without.
    """

    _TRIES = 3

    def __init__(self) -> None:
        super().__init__(name="spare", daemon=True)
        self.name_of_socket = f"drivetrain-spare-{os.getpid()}-{secrets.token_hex(8)}"

    def run(self) -> None:
        """Start, and wait for the end."""
        log = logging.getLogger(__name__)
        command = [sys.executable, "-m", "drivetrain_cli.spare"]
        environment = {**os.environ, VARIABLE: self.name_of_socket}
        for number in range(1, self._TRIES + 1):
            process = subprocess.Popen(command, env=environment, stdin=subprocess.DEVNULL)
            code = process.wait()
            log.warning("spare %d (process %d) has ended with %d", number, process.pid, code)


def main() -> None:
    """Be the spare, and in its copies a rank."""
    agent = os.pidfd_open(os.getppid())
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ranks get their own, and have own handlers
    # Those who ask early wait for the imports here, as they would for their own.
    listener = listener_at(os.environ[VARIABLE])
    for name in spare_modules.MODULES:
        importlib.import_module(name)
    gc.freeze()  # so that collecting garbage does not copy the memory that copies share
    found = Spare(listener, agent).serve()
    if found is not None:
        _become(*found)


def _become(request: dict[str, Any], streams: list[int]) -> None:
    """Be the rank that was asked for."""
    from drivetrain_cli import rank

    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    sys.argv = request["argv"]
    if "numpy" in sys.modules:  # whose generator would be the same on all ranks; Python's is not
        sys.modules["numpy"].random.seed()
    rank.main()


if __name__ == "__main__":
    main()
