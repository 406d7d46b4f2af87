"""Which machines take part in a run, where they meet, and what of that cannot work from here."""

from __future__ import annotations

import platform
import secrets
import socket
import struct
from dataclasses import dataclass

import click

from drivetrain.communication.network import Route, is_own, route_to
from drivetrain.errors import DrivetrainError

_DEFAULT_PORT = 29400
"""Of torchrun's endpoints."""

_PING = 13
"""Of the queries that torch's store answers."""

_STORE_SECONDS = 30.0
"""How long the store of a busy machine may take to answer; another program mostly hangs up."""


@dataclass(frozen=True)
class Nodes:
    """Which machines take part and how they find each other; the default is this one alone.

    Args:
        count: number of machines, or ``"MIN:MAX"`` for an elastic job.
        rank: this machine's place among them, where ``master_port`` is given.
        master_addr: host of the first machine.
        master_port: port there; ``None`` on one machine means any free one.
        rdzv_endpoint: ``HOST:PORT`` at which machines meet in any order, instead of a master.
        rdzv_id: name of the job there.
        max_restarts: how often a failed job is started again.
    """

    count: str
    rank: int
    master_addr: str
    master_port: int | None
    rdzv_endpoint: str | None
    rdzv_id: str
    max_restarts: int

    @property
    def alone(self) -> bool:
        """True if this machine is the only one."""
        return self.most == 1

    @property
    def most(self) -> int:
        """The largest number of machines.

        Raises:
            DrivetrainError: ``count`` is no number and no range.
        """
        numbers = self.count.split(":")
        if len(numbers) <= 2 and all(number.isdecimal() for number in numbers):
            least, most = int(numbers[0]), int(numbers[-1])
            if 1 <= least <= most:
                return most
        raise DrivetrainError(f"--nnodes takes a positive number or MIN:MAX, got {self.count!r}")

    def arguments(self) -> list[str]:
        """The rendezvous as torchrun takes it.

        Raises:
            DrivetrainError: the machines could not meet there.
        """
        if self.max_restarts < 0:
            raise DrivetrainError(f"--max-restarts cannot be negative, got {self.max_restarts}")
        common = ["--nnodes", self.count, "--max-restarts", str(self.max_restarts)]
        if self.rdzv_endpoint is not None:
            return [*common, *self._at_an_endpoint(*_split(self.rdzv_endpoint))]
        if self.master_port is not None:
            self._check_master(self.master_port)
            master = ["--master-addr", self.master_addr, "--master-port", str(self.master_port)]
            return [*common, *master, "--node-rank", str(self.rank)]
        if not self.alone:
            raise DrivetrainError(
                f"{self.count} machines need a place to meet: give --rdzv-endpoint HOST:PORT, or "
                "--node-rank, --master-addr and --master-port, the same master on every machine"
            )
        self._check_rank()
        return [*common, "--standalone", "--local-addr", "127.0.0.1"]

    def interface(self) -> str:
        """The network interface that leads to the other machines; empty if it is not certain."""
        if self.alone:
            return ""
        endpoint = self.rdzv_endpoint
        route = route_to(self.master_addr if endpoint is None else _split(endpoint)[0])
        return "" if route is None or route.is_loopback else route.interface

    def check_port(self) -> None:
        """Refuse a master port of this machine that another program listens on."""
        if self.master_port is None or self.rdzv_endpoint is not None or self.rank > 0:
            return
        if (problem := _taken(self.master_port)) is not None:
            raise DrivetrainError(
                f"port {self.master_port} cannot be used ({problem}); give another "
                "--master-port, or on one machine leave it out to have a free one chosen"
            )

    def _at_an_endpoint(self, host: str, port: int) -> list[str]:
        route = _route("--rdzv-endpoint", host)
        problem = _taken(port)
        if problem is not None and is_own(route.other) and not _is_store(host, port):
            raise DrivetrainError(
                f"port {port} of --rdzv-endpoint cannot be used ({problem}), and what listens "
                "on it is no other machine's run; give another port, the same on every machine"
            )
        endpoint = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
        meeting = ["--rdzv-backend", "c10d", "--rdzv-endpoint", endpoint]
        meeting += ["--rdzv-id", self.rdzv_id]
        if route.is_loopback and _is_number(host):
            if not self.alone:
                _warn_of_loopback(host, "--rdzv-endpoint")
            return meeting
        # Torchrun compares names to find out whether it hosts the meeting; what they resolve to
        # may differ from machine to machine, so it is told. Of several runs on the machine of the
        # endpoint the first one does.
        hosts = is_own(route.other) and problem is None
        own = host if is_own(route.other) else route.own
        return [*meeting, "--rdzv-conf", f"is_host={str(hosts).lower()}", "--local-addr", own]

    def _check_master(self, port: int) -> None:
        if not 0 < port < 2**16:
            raise DrivetrainError(f"--master-port must be between 1 and 65535, got {port}")
        self._check_rank()
        route = _route("--master-addr", self.master_addr)
        if route.is_loopback and not self.alone and (self.rank > 0 or _is_number(self.master_addr)):
            _warn_of_loopback(self.master_addr, "--master-addr")
        if self.rank == 0 and not is_own(route.other):
            raise DrivetrainError(
                f"--node-rank 0 runs on the machine of --master-addr, but {self.master_addr} "
                f"({route.other}) is not an address of {platform.node()} ({route}); give this "
                "machine's address, or another --node-rank"
            )

    def _check_rank(self) -> None:
        if not 0 <= self.rank < self.most:
            raise DrivetrainError(
                f"--node-rank counts machines from 0 to {self.most - 1} (--nnodes {self.count}), "
                f"got {self.rank}"
            )


def _split(endpoint: str) -> tuple[str, int]:
    host, _, port = endpoint.rpartition(":") if _has_port(endpoint) else (endpoint, "", "")
    if not port:
        port = str(_DEFAULT_PORT)
    host = host.removeprefix("[").removesuffix("]")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise DrivetrainError(
            f"--rdzv-endpoint takes HOST:PORT with a port between 1 and 65535, got {endpoint!r}"
        )
    return host, int(port)


def _has_port(endpoint: str) -> bool:
    return ":" in endpoint and not endpoint.endswith("]")


def _route(option: str, host: str) -> Route:
    route = route_to(host)
    if route is None:
        raise DrivetrainError(
            f"{option}: {platform.node()} knows no way to {host!r}: its name does not resolve, or "
            "no network interface leads there"
        )
    return route


def _is_number(host: str) -> bool:
    """True for an address rather than a name."""
    return ":" in host or host.replace(".", "").isdecimal()


def _warn_of_loopback(host: str, option: str) -> None:
    message = (
        f"warning: on {platform.node()}, {host} means this machine itself: where machines differ, "
        f"give {option} an address that all of them can reach"
    )
    click.secho(message, fg="yellow", err=True)


def _is_store(host: str, port: int) -> bool:
    """Whether torch's store, through which runs meet, listens on a port of this machine.

    It answers a ping with the number that came with it; who connects first says the magic number of
    the protocol (``torch/csrc/distributed/c10d/TCPStoreBackend.hpp``).
    """
    nonce = secrets.token_bytes(4)
    hello = struct.pack("=BI", 0, 0x3C85F7CE) + struct.pack("=B", _PING) + nonce
    try:
        with socket.create_connection((host, port), timeout=_STORE_SECONDS) as connection:
            connection.sendall(hello)
            answer = connection.recv(4, socket.MSG_WAITALL)
    except OSError:  # it hangs up, or says nothing
        return False
    return answer == nonce


def _taken(port: int) -> str | None:
    """Why no server of this machine can listen on ``port``; None if it can."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            return error.strerror or str(error)
    return None
