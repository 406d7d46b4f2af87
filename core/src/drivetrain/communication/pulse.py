"""How ranks find out that the process of another rank has ended, also on other hosts.

Every process listens on a port and never accepts. While it lives, its system accepts connections
for it, however busy or stopped it is; once it has ended, its system refuses them. So asking costs
the rank that is asked nothing, and no thread is needed for the answer.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import time
from collections.abc import Mapping
from contextlib import ExitStack, suppress

from drivetrain.communication.network import is_loopback

Place = tuple[str, int]
"""Numeric address and port where a process listens; port 0 if it does not."""

NOWHERE: Place = ("", 0)

_AT_ONCE = 256
"""Connections that are tried at the same time: a process may have few descriptors left."""

_listeners: dict[str, socket.socket] = {}
"""Own address -> where this process listens there, until it ends."""


def listen(address: str) -> Place:
    """Where others can see that this process lives; :data:`NOWHERE` where it cannot listen."""
    if address not in _listeners:
        family = socket.AF_INET6 if ":" in address else socket.AF_INET
        try:
            _listeners[address] = socket.create_server((address, 0), family=family, backlog=4096)
        except OSError:
            return NOWHERE
        _listeners[address].setblocking(False)
    return address, int(_listeners[address].getsockname()[1])


def ended(places: Mapping[int, Place], own: Place, seconds: float) -> list[int]:
    """The ranks whose processes are known to have ended; an answer takes ``seconds`` at most.

    Args:
        places: rank -> where it listens.
        own: where this process listens.
        seconds: how long to wait for those that neither accept nor refuse.
    """
    _let_go_of_visitors()
    # The loopback address of another machine would mean a port of this one.
    visible = [
        (rank, place)
        for rank, place in places.items()
        if place[1] and (not is_loopback(place[0]) or (own[1] and is_loopback(own[0])))
    ]
    found: list[int] = []
    for start in range(0, len(visible), _AT_ONCE):
        found += _refused(visible[start : start + _AT_ONCE], seconds)
    return found


def _refused(places: list[tuple[int, Place]], seconds: float) -> list[int]:
    deadline = time.monotonic() + seconds
    found: list[int] = []
    with ExitStack() as visitors, selectors.DefaultSelector() as pending:
        for rank, place in places:
            family = socket.AF_INET6 if ":" in place[0] else socket.AF_INET
            visitor = visitors.enter_context(socket.socket(family, socket.SOCK_STREAM))
            visitor.setblocking(False)
            code = visitor.connect_ex(place)
            if code == errno.EINPROGRESS:
                pending.register(visitor, selectors.EVENT_WRITE, (rank, visitor))
            elif _is_refused(visitor, code):
                found.append(rank)
        while pending.get_map() and time.monotonic() < deadline:
            for key, _ in pending.select(max(0.0, deadline - time.monotonic())):
                rank, visitor = key.data
                pending.unregister(visitor)
                if _is_refused(visitor, visitor.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)):
                    found.append(rank)
    return sorted(found)


def _is_refused(visitor: socket.socket, code: int) -> bool:
    """True if nobody listens; a connection to oneself is what TCP may make of that."""
    if code == 0:
        return bool(visitor.getsockname() == visitor.getpeername())
    return code == errno.ECONNREFUSED


def _let_go_of_visitors() -> None:
    """Make room for those who will ask later."""
    for listener in _listeners.values():
        with suppress(OSError):
            while True:
                listener.accept()[0].close()


def _end_in_child() -> None:
    """A forked process must not seem to be the one that it was forked from."""
    while _listeners:
        _listeners.popitem()[1].close()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_end_in_child)
