"""How the ranks of a job come together: at a store, before the first process group is made.

1. Every rank connects to the store of the launcher or of rank 0, and writes down where it listens.
2. The last one to come says so, and all go on.
3. Each joins the process group while it watches that the others still live.

A rank that waits says for whom, and a rank whose process has ended is named at once.
"""

from __future__ import annotations

import json
import logging
import os
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import wait
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from drivetrain.communication import aside, pulse
from drivetrain.communication.network import Route, interface_of, is_own, route_to
from drivetrain.errors import CommunicationError

if TYPE_CHECKING:
    from drivetrain.communication.process_group import Ranks

T = TypeVar("T")

logger = logging.getLogger("drivetrain.meeting")

PATIENCE_SECONDS = 5.0
"""How long a rank waits before it says for whom, for the first time; then it doubles."""

_MOST_PATIENCE_SECONDS = 60.0

_LOOK_SECONDS = 1.0
"""How often a rank that waits looks whether the others live; more seldom among many."""

_TIMEOUT = timedelta(minutes=30)

_GLOO_INTERFACE = "GLOO_SOCKET_IFNAME"

_servers: dict[str, tuple[Store, Iterator[int]]] = {}
"""Rendezvous address -> the store of this process there, and numbers for groups that meet in it."""


_routes: dict[str, Route] = {}
"""Rendezvous host -> the route there by which other hosts reach this one."""


class Meeting:
    """One rank's way into one process group.

    Args:
        ranks: this process's place.
        timeout: how long to wait for the others.

    Raises:
        ValueError: the environment does not say where to meet.
    """

    def __init__(self, ranks: Ranks, timeout: timedelta | None) -> None:
        self._ranks = ranks
        self._timeout = timeout or _TIMEOUT
        self._host, self._port = _address()
        self._route = route_to(self._host)
        self._place = pulse.listen(self._route.own) if self._route is not None else pulse.NOWHERE
        self._prefix = ""
        self._eyes: Store | None = None
        self._words = _Words(str(self))

    def __str__(self) -> str:
        way = "" if self._route is None else f" ({self._route})"
        meeting = f"meeting at {self._host}:{self._port}"
        return (
            f"rank {self._ranks.rank} of {self._ranks.world_size} on host {platform.node()}{way}, "
            f"{meeting},"
        )

    def come(self) -> Store:
        """Meet all other ranks; returns a store for the process group.

        Raises:
            CommunicationError: one of them has ended, or did not come in time.
        """
        server, number = self._server()
        self._prefix = f"drivetrain/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}/{number}"
        store = PrefixStore(self._prefix, server)
        self._eyes = store
        store.set(f"here/{self._ranks.rank}", json.dumps(self._place))
        if self._route is not None and not self._route.is_loopback:
            store.set("seen", self._route.other)
        if store.add("came", 1) == self._ranks.world_size:
            store.set("all", "")
        deadline = time.monotonic() + self._timeout.total_seconds()
        looked = time.monotonic()
        pause = 0.001
        while not store.check(["all"]):
            time.sleep(pause)
            pause = min(2 * pause, 0.1)
            now = time.monotonic()
            if now - looked > self._pause():
                missing = self._look()
                looked = time.monotonic()
                if now > deadline:
                    raise CommunicationError(f"{self} waited {self._timeout} in vain for {missing}")
                self._words.say(missing)
        self._eyes = None
        self._use_interface(store)
        return store

    def join(self, step: Callable[[], T]) -> T:
        """Carry out ``step``, in which this rank joins the others, and watch that they live.

        Raises:
            CommunicationError: one of them has ended.
        """
        joining = aside.begin(step)
        while joining not in wait([joining], self._pause()).done:
            self._look()
            self._words.say("the others to join the process group")
        return joining.result()

    def _pause(self) -> float:
        return max(_LOOK_SECONDS, self._ranks.world_size / 64)

    def _server(self) -> tuple[Store, int]:
        """The store behind all groups of this process, and the number of the next group.

        The server is found once and lives as long as the process. If every group brought its own,
        a rank that starts the next group early would talk to the server of the last one, which
        ends while it waits.
        """
        address = f"{self._host}:{self._port}"
        if address not in _servers:
            _servers.clear()
            hosts = self._ranks.rank == 0 and not agent_hosts_store()
            connecting = aside.begin(lambda: self._connect(hosts=hosts, timeout=self._timeout))
            while connecting not in wait([connecting], self._pause()).done:
                self._words.say(f"{store_host()}, which has not opened the store there")
            _servers[address] = (connecting.result(), count())
        store, numbers = _servers[address]
        return store, next(numbers)

    def _connect(self, *, hosts: bool, timeout: timedelta) -> Store:
        options: dict[str, Any] = {"wait_for_workers": False, "multi_tenant": True}
        return dist.TCPStore(  # type: ignore[attr-defined]
            self._host, self._port, None, hosts, timeout, **options
        )

    def _look(self) -> str:
        """Which ranks are not there yet.

        Raises:
            CommunicationError: one of those that came has ended.
        """
        if self._eyes is None:  # whoever joins the group may keep the other connection busy
            client = self._connect(hosts=False, timeout=timedelta(seconds=10))
            self._eyes = PrefixStore(self._prefix, client)
        places: dict[int, pulse.Place] = {}
        missing = []
        for rank in range(self._ranks.world_size):
            if not self._eyes.check([f"here/{rank}"]):
                missing.append(str(rank))
            elif rank != self._ranks.rank:
                places[rank] = tuple(json.loads(self._eyes.get(f"here/{rank}")))
        ended = pulse.ended(places, self._place, _LOOK_SECONDS)
        if ended:
            # Whoever found that first has ended as well by the time that others look.
            first = self._eyes.compare_set("ended", "", ", ".join(map(str, ended)))
            names = first.decode()
            raise CommunicationError(
                f"rank {names} ended (killed, or crashed) before all ranks had joined; "
                f"noticed by {str(self).rstrip(',')}"
            )
        return f"rank {', '.join(missing)}" if missing else "nobody any more"

    def _use_interface(self, store: Store) -> None:
        """Let gloo use the interface that leads to the other hosts.

        By itself it takes the one that this host's name resolves to, often the loopback interface.
        """
        route = self._route
        if route is not None and route.is_loopback and store.check(["seen"]):
            # Rank 0's host, whose name means itself there; others see it at its address.
            seen = store.get("seen").decode()
            route = Route(seen, seen, interface_of(seen)) if is_own(seen) else None
        if route is None:
            return
        _routes[self._host] = route
        if route.interface:
            os.environ.setdefault(_GLOO_INTERFACE, route.interface)


def agent_hosts_store() -> bool:
    """True if the launcher hosts the store, and not rank 0."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def store_host() -> str:
    """Who hosts the store, in words."""
    return "the launcher of the first machine" if agent_hosts_store() else "rank 0"


class _Words:
    """What a rank says while it waits: first after a while, then more and more seldom.

    Args:
        who: the rank, and where it waits.
    """

    def __init__(self, who: str) -> None:
        self._who = who
        self._began = time.monotonic()
        self._next = PATIENCE_SECONDS

    def say(self, awaited: str) -> None:
        """Log that ``awaited`` is waited for, if it is time to."""
        waited = time.monotonic() - self._began
        if waited > self._next:
            self._next = waited + min(waited, _MOST_PATIENCE_SECONDS)
            logger.warning("%s has waited %.0f s for %s", self._who, waited, awaited)


def _address() -> tuple[str, int]:
    values = {name: os.environ.get(name, "") for name in ("MASTER_ADDR", "MASTER_PORT")}
    absent = [name for name, value in values.items() if not value]
    if absent:
        raise ValueError(
            f"environment variable {' and '.join(absent)} is not set: start the ranks with "
            "torchrun or drivetrain run"
        )
    port = values["MASTER_PORT"]
    if not port.isdecimal() or not 0 < int(port) < 2**16:
        raise ValueError(f"environment variable MASTER_PORT must be a port, got {port!r}")
    return values["MASTER_ADDR"], int(port)


def own_place() -> pulse.Place:
    """Where the other ranks can see that this process lives."""
    host = os.environ.get("MASTER_ADDR", "")
    route = _routes.get(host) or route_to(host)
    return pulse.NOWHERE if route is None else pulse.listen(route.own)
