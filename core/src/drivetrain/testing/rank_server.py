"""A process that has torch loaded and forks ranks from itself, so that a rank starts in no time.

It lives as long as the process that uses it: when that one goes, however it goes, the socket
closes and the server kills every rank. multiprocessing's forkserver leaves its children alone.
"""

from __future__ import annotations

import faulthandler
import gc
import json
import os
import signal
import socket
import sys
from importlib import import_module
from typing import Any, NoReturn

_PRELOAD = ("torch", "torch.distributed", "drivetrain.job", "drivetrain.testing.rank")

# Where processes can be forked, there are both; elsewhere this can be imported, and no more.
STACK_SIGNAL = getattr(signal, "SIGUSR1", signal.SIGTERM)
KILL = getattr(signal, "SIGKILL", signal.SIGTERM)
"""Makes a rank write the stacks of its threads into its stack pipe."""


def main() -> None:
    """Serve requests on the socket whose descriptor is the last argument."""
    server = socket.socket(fileno=int(sys.argv[-1]))
    for name in _PRELOAD:
        import_module(name)
    gc.freeze()  # ranks collect garbage after each call, and what is loaded here is none
    ranks: set[int] = set()
    try:
        while True:
            # One request at a time, each answered before the next: a read is a whole request.
            message, descriptors, _, _ = socket.recv_fds(server, 4096, 2)
            if not message:
                return
            answer = _serve(server, json.loads(message), descriptors, ranks)
            server.sendall(json.dumps(answer).encode())
    finally:
        for pid in ranks:
            _end(pid, KILL)


def _serve(
    server: socket.socket, request: dict[str, Any], descriptors: list[int], ranks: set[int]
) -> int:
    """Start a rank (answers its pid), signal one (0), or end one (its exit code)."""
    if request["do"] == "start":
        pid = os.fork()
        if pid == 0:
            server.close()
            _become_rank(*descriptors)
        for descriptor in descriptors:
            os.close(descriptor)
        ranks.add(pid)
        return pid
    pid = request["pid"]
    if request["do"] == "signal":
        os.kill(pid, request["signal"])
        return 0
    ranks.remove(pid)
    return _end(pid, request["signal"])


def _end(pid: int, number: int) -> int:
    """The exit code of a rank that is ending, or is ended by signal ``number``."""
    # Ranks are reaped here only, so the pid is still ours even if the rank is dead.
    if number:
        os.kill(pid, number)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _become_rank(control: int, stacks: int) -> NoReturn:
    from drivetrain.testing.rank import serve

    code = 1
    try:
        faulthandler.register(STACK_SIGNAL, file=stacks, all_threads=True)
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # the user's Ctrl-C ends ranks through us
        serve(control)
        code = 0
    finally:
        os._exit(code)


if __name__ == "__main__":
    main()
