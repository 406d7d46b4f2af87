"""Keepers of several hosts: each sends its files to a neighbour, and asks the others for theirs.

Over TCP, on the network that the ranks meet on. A message is its length in 8 bytes, JSON, and as
many bytes as its key ``bytes`` says. The first message of a connection has the token that ranks of
the job have agreed on; whoever does not know it is not answered.
"""

from __future__ import annotations

import hmac
import json
import os
import socket
import threading
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from drivetrain_elasticity.files import Files, memory_file, write_all

PATIENCE = 30.0
"""Seconds that a keeper of another host has to take or to answer a message."""

_MOST_JSON = 1 << 24
_PART = 1 << 20


@dataclass(frozen=True)
class Address:
    """Where a keeper can be reached, and by whom it is known.

    Args:
        id: of the process, the same for all ranks of its host.
        host: its address.
        port: its port.
    """

    id: str
    host: str
    port: int


class GoneError(OSError):
    """A keeper of another host does not answer."""


def send(connection: socket.socket, message: dict[str, Any], file: int | None = None) -> None:
    """Send a message, with the contents of ``file`` behind it."""
    size = 0 if file is None else os.fstat(file).st_size
    data = json.dumps({**message, "bytes": size}).encode()
    connection.sendall(len(data).to_bytes(8, "big") + data)
    if file is not None and size:
        with os.fdopen(file, "rb", closefd=False) as contents:
            connection.sendfile(contents, 0, size)


def receive(connection: socket.socket) -> tuple[dict[str, Any], int | None]:
    """A message, and a file of memory with the bytes behind it, which is the caller's.

    Raises:
        OSError: the other side has gone, or sends something else.
    """
    length = int.from_bytes(_exactly(connection, 8), "big")
    if length > _MOST_JSON:
        raise GoneError("what came is no message of a keeper")
    message: dict[str, Any] = json.loads(_exactly(connection, length))
    rest = int(message["bytes"])
    if not rest:
        return message, None
    file = memory_file()
    try:
        while rest:
            part = _exactly(connection, min(rest, _PART))
            write_all(file, part)
            rest -= len(part)
    except BaseException:
        os.close(file)
        raise
    return message, file


def _exactly(connection: socket.socket, count: int) -> bytearray:
    data = bytearray(count)
    rest = memoryview(data)
    while rest:
        got = connection.recv_into(rest)
        if not got:
            raise GoneError("the connection between two keepers has ended")
        rest = rest[got:]
    return data


class Peer:
    """A keeper of another host, as this one reaches it.

    Args:
        address: where.
        token: of the job.
    """

    def __init__(self, address: Address, token: str) -> None:
        self.address = address
        self._token = token
        self._lock = threading.Lock()
        self._connection: socket.socket | None = None

    def ask(self, message: dict[str, Any], file: int | None = None) -> tuple[Any, int | None]:
        """The answer, and a file of memory if one came with it.

        Raises:
            GoneError: it cannot be reached, or takes longer than :data:`PATIENCE`.
        """
        with self._lock, self._reached() as connection:
            send(connection, message, file)
            answer, found = receive(connection)
        return answer["answer"], found

    def tell(self, message: dict[str, Any]) -> None:
        """Send a message that has no answer; one that cannot be reached misses it."""
        with suppress(OSError), self._lock, self._reached() as connection:
            send(connection, message)

    def _reached(self) -> _Reached:
        return _Reached(self)

    def connect(self) -> socket.socket:
        """The connection, begun if need be."""
        if self._connection is None:
            place = (self.address.host, self.address.port)
            self._connection = socket.create_connection(place, timeout=PATIENCE)
            self._connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            send(self._connection, {"token": self._token})
        return self._connection

    def close(self) -> None:
        """Let go of the connection."""
        connection, self._connection = self._connection, None
        if connection is not None:
            connection.close()


class _Reached:
    """The connection of a peer for one exchange; given up where that fails."""

    def __init__(self, peer: Peer) -> None:
        self._peer = peer

    def __enter__(self) -> socket.socket:
        try:
            return self._peer.connect()
        except OSError as error:
            self._peer.close()
            raise self._gone(error) from error

    def __exit__(self, kind: object, error: BaseException | None, _frames: object) -> None:
        if error is not None:
            self._peer.close()  # half an exchange may be under way on it
            if isinstance(error, OSError):
                raise self._gone(error) from error

    def _gone(self, error: OSError) -> GoneError:
        where = self._peer.address
        return GoneError(f"the keeper at {where.host}:{where.port} does not answer: {error}")


class Neighbours:
    """The keepers of a job's hosts, without this one; nearest first, round the ring of hosts.

    Args:
        files: of this keeper.
    """

    def __init__(self, files: Files) -> None:
        self._files = files
        self._token = ""
        self._peers: list[Peer] = []
        self._listener: socket.socket | None = None
        self._lock = threading.Lock()

    def listen(self, host: str) -> int:
        """Accept other keepers at an address of this host; answers the port."""
        with self._lock:
            if self._listener is None or self._listener.getsockname()[0] != host:
                family = socket.AF_INET6 if ":" in host else socket.AF_INET
                self._listener = socket.create_server((host, 0), family=family, backlog=256)
                thread = threading.Thread(target=self._accept, args=(self._listener,), daemon=True)
                thread.start()
            return int(self._listener.getsockname()[1])

    def join(self, token: str, own: str, addresses: Sequence[Address]) -> None:
        """Work with these keepers from now on; again with the same token changes nothing.

        Args:
            token: that the job's ranks have agreed on; empty where there is one keeper.
            own: id of this keeper.
            addresses: all of them, in the order of their hosts; none where this is the only one.
        """
        with self._lock:
            if token == self._token:
                return
            before, self._token = self._peers, token
            at = [address.id for address in addresses].index(own) if addresses else 0
            ring = [*addresses[at + 1 :], *addresses[:at]]
            self._peers = [Peer(address, token) for address in ring]
        for peer in before:
            peer.close()

    @property
    def peers(self) -> list[Peer]:
        """Those of now."""
        with self._lock:
            return self._peers

    def copy(self, path: str, file: int, everywhere: bool) -> None:
        """Put a file that this keeper has into the nearest keeper that takes it, or into all.

        Raises:
            GoneError: none does, so the file would be lost with this host.
        """
        peers, taken = self.peers, 0
        error: OSError | None = None
        for peer in peers:
            try:
                peer.ask({"do": "put", "path": path}, file)
            except OSError as gone:
                error = gone
                continue
            taken += 1
            if not everywhere:
                break
        if peers and not taken:
            raise GoneError(f"no other host has taken a copy of {path}: {error}") from error

    def remove(self, path: str) -> None:
        """Have all remove a file."""
        for peer in self.peers:
            peer.tell({"do": "remove", "path": path})

    def names(self, folder: str) -> set[str]:
        """What any of them has in ``folder``."""
        found = set[str]()
        for peer in self.peers:
            with suppress(GoneError):
                found.update(peer.ask({"do": "names", "path": folder})[0])
        return found

    def size(self, path: str) -> int | None:
        """Bytes of a file that one of them has; ``None`` if none has it."""
        for peer in self.peers:
            with suppress(GoneError):
                size: int | None = peer.ask({"do": "size", "path": path})[0]
                if size is not None:
                    return size
        return None

    def read(self, path: str, offset: int, count: int) -> tuple[bool, int | None]:
        """True, and bytes in a file of memory, if one of them has the file."""
        message = {"do": "read", "path": path, "offset": offset, "count": count}
        for peer in self.peers:
            with suppress(GoneError):
                found, file = peer.ask(message)
                if found:
                    return True, file
        return False, None

    # -- what others ask ----------------------------------------------------------------------

    def _accept(self, listener: socket.socket) -> None:
        while True:
            try:
                connection, _ = listener.accept()
            except OSError:
                return
            threading.Thread(target=self._serve, args=(connection,), daemon=True).start()

    def _serve(self, connection: socket.socket) -> None:
        with connection, suppress(OSError, ValueError, KeyError, TypeError):
            connection.settimeout(PATIENCE)
            token = str(receive(connection)[0]["token"])
            with self._lock:
                known = self._token
            if not known or not hmac.compare_digest(token.encode(), known.encode()):
                return
            connection.settimeout(None)
            while True:
                self._answer(connection, *receive(connection))

    def _answer(self, connection: socket.socket, message: dict[str, Any], file: int | None) -> None:
        what, path = message["do"], message["path"]
        if what == "remove":
            self._files.remove(path)
        elif what == "put":
            self._files.put(path, memory_file() if file is None else file)
            send(connection, {"answer": True})
        elif what == "names":
            send(connection, {"answer": sorted(self._files.names(path))})
        elif what == "size":
            send(connection, {"answer": self._files.size(path)})
        elif what == "read":
            found = self._files.read(path, message["offset"], message["count"])
            with_bytes = memory_file()
            try:
                write_all(with_bytes, found or b"")
                send(connection, {"answer": found is not None}, with_bytes)
            finally:
                os.close(with_bytes)
