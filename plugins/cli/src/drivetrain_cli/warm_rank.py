"""What torchrun starts for every rank of ``drivetrain run --spare``: hands the rank to the spare.

It imports next to nothing, waits, passes signals on to the rank, and ends as the rank does. Where
the spare is missing it becomes the rank itself, after saying so.
"""

from __future__ import annotations

import json
import os
import resource
import signal
import socket
import sys
from pathlib import Path
from types import FrameType

from drivetrain_cli.spare import PACKET, VARIABLE, same_user, send_signal

_FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


def main() -> None:
    """Have the spare run the rank; answers with its end."""
    connection = _asked()
    if connection is None:
        if os.environ["LOCAL_RANK"] == "0":
            sys.stderr.write(
                "warning: the spare process is missing, so ranks start from the beginning, which "
                "takes seconds longer; agent.log in the run folder tells how it has ended\n"
            )
        from drivetrain_cli import rank

        rank.main()
        return
    rank_process = 0
    early: list[int] = []

    def forward(number: int, _frame: FrameType | None) -> None:
        if rank_process:
            send_signal(rank_process, number)
        else:
            early.append(number)

    for number in _FORWARDED:
        signal.signal(number, forward)
    while data := _heard(connection):
        message = json.loads(data)
        if "status" in message:
            _end_like(message["status"])
        rank_process = message["pid"]
        for waiting in early:
            send_signal(rank_process, waiting)
    sys.stderr.write("the spare process has ended, and this rank with it\n")
    os._exit(1)


def _asked() -> socket.socket | None:
    """A connection to the spare, which has our request; ``None`` if there is no spare."""
    connection = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, PACKET)
    request = {"argv": sys.argv, "env": dict(os.environ), "cwd": str(Path.cwd())}
    try:
        connection.connect(f"\0{os.environ[VARIABLE]}")
        if same_user(connection):
            socket.send_fds(connection, [json.dumps(request).encode()], [0, 1, 2])
            return connection
    except OSError:  # it has ended, or the environment is too large to be handed over
        pass
    connection.close()
    return None


def _heard(connection: socket.socket) -> bytes:
    """What the spare says next; nothing when it has ended."""
    try:
        return connection.recv(PACKET)
    except ConnectionResetError:  # it has ended before it read our request
        return b""


def _end_like(status: int) -> None:
    """End as the rank has: with its exit code, or by its signal."""
    code = os.waitstatus_to_exitcode(status)
    if code >= 0:
        os._exit(code)
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # the rank has left one, if any
    signal.signal(-code, signal.SIG_DFL) if -code not in (signal.SIGKILL, signal.SIGSTOP) else None
    os.kill(os.getpid(), -code)


if __name__ == "__main__":
    main()
