"""A process beside the workers that keeps files in memory while workers are restarted.

It holds open descriptors of anonymous memory (memfd) that workers have written and passed to it,
and passes them back to those that ask. So it copies nothing, and when it ends nothing is left: no
file, no shared memory. It ends with the process that owns it, the agent that restarts workers.

In a job on several hosts each has a keeper. A file that a worker hands over is also sent to the
next host's keeper before the worker is answered, and one that is not here is asked for there
(:mod:`~drivetrain_elasticity.peers`); so a host may be lost with all that it has.

Requests and answers are packets of JSON over a socket in the abstract namespace of Unix sockets;
both sides accept only processes of the same user.
"""

from __future__ import annotations

import json
import os
import secrets
import select
import socket
import struct
import sys
import threading
from contextlib import suppress
from pathlib import Path
from typing import Any

from drivetrain_elasticity.files import Files
from drivetrain_elasticity.peers import Address, Neighbours

OWNER = "DRIVETRAIN_KEEPER_OWNER"
"""Variable with the process that the keeper ends with, where it is not the parent of workers."""

PACKET = 1 << 17


class Keeper:
    """The process: files by name, and the keepers of other hosts."""

    def __init__(self) -> None:
        self._id = secrets.token_hex(8)
        self._files = Files()
        self._neighbours = Neighbours(self._files)

    def serve(self, listener: socket.socket) -> None:
        """Answer every worker in a thread of its own, for ever."""
        while True:
            worker, _ = listener.accept()
            if user_of(worker) == os.getuid():
                threading.Thread(target=self._serve, args=(worker,), daemon=True).start()
            else:
                worker.close()

    def _serve(self, worker: socket.socket) -> None:
        with worker, suppress(OSError):  # it has gone
            while True:
                data, files, _, _ = socket.recv_fds(worker, PACKET, 1)
                if not data:
                    return
                try:
                    answer, sent = self._do(json.loads(data), files)
                except OSError as error:
                    answer, sent = {"error": str(error)}, None
                try:
                    packet = [json.dumps(answer).encode()]
                    socket.send_fds(worker, packet, [] if sent is None else [sent])
                finally:
                    if sent is not None:
                        os.close(sent)

    def _do(self, request: dict[str, Any], files: list[int]) -> tuple[Any, int | None]:
        """The answer, and a descriptor that goes with it and is closed then."""
        what, path = request["do"], request.get("path", "")
        if what == "put":
            self._files.put(path, files[0])
            with self._files.opened(path) as file:
                if file is not None:
                    self._neighbours.copy(path, file, request["everywhere"])
        elif what == "open":
            with self._files.opened(path) as file:
                return file is not None, None if file is None else os.dup(file)
        elif what == "read":
            return self._neighbours.read(path, request["offset"], request["count"])
        elif what == "size":
            own = self._files.size(path)
            return (self._neighbours.size(path) if own is None else own), None
        elif what == "remove":
            self._files.remove(path)
            if not request["here"]:
                self._neighbours.remove(path)
        elif what == "names":
            found = self._files.names(path)
            return sorted(found if request["here"] else found | self._neighbours.names(path)), None
        elif what == "id":
            return self._id, None
        elif what == "listen":
            return self._neighbours.listen(request["host"]), None
        elif what == "join":
            addresses = [Address(*each) for each in request["addresses"]]
            self._neighbours.join(request["token"], self._id, addresses)
        return None, None


def main() -> None:
    """Serve until the owner ends; ``sys.argv`` has its process."""
    owner = int(sys.argv[1])
    try:
        watched = os.pidfd_open(owner)
        listener = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        listener.bind(name_of(owner))
    except OSError:  # the owner has gone, or another rank was faster
        return
    listener.listen(256)
    threading.Thread(target=Keeper().serve, args=(listener,), daemon=True).start()
    select.select([watched], [], [])


def name_of(owner: int) -> str:
    """Where the keeper listens; the owner's start makes its number unique."""
    text = Path(f"/proc/{owner}/stat").read_text("utf-8", errors="replace")
    return f"\0drivetrain-keeper-{owner}-{text.rpartition(')')[2].split()[19]}"


def user_of(connection: socket.socket) -> int:
    """The user whose process is at the other end."""
    size = struct.calcsize("3i")
    found = connection.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, size)
    return int(struct.unpack("3i", found)[1])


if __name__ == "__main__":
    main()
