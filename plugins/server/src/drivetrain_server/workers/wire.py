"""Messages between the server and a worker: JSON, each with its length before it."""

from __future__ import annotations

import asyncio
import json
import socket
import struct
import threading
from typing import Any

Message = dict[str, Any]

_LENGTH = struct.Struct(">I")
LONGEST = 256 * 2**20
"""Bytes of a message; far more than any request may have."""


def packed(message: Message) -> bytes:
    """The message as it travels."""
    body = json.dumps(message, separators=(",", ":")).encode()
    return _LENGTH.pack(len(body)) + body


async def receive(reader: asyncio.StreamReader) -> Message | None:
    """The next message; ``None`` when the other side has gone."""
    try:
        (length,) = _LENGTH.unpack(await reader.readexactly(_LENGTH.size))
        body = await reader.readexactly(length)
    except (asyncio.IncompleteReadError, ConnectionError):
        return None
    message: Message = json.loads(body)
    return message


class Wire:
    """The worker's end: reads block, and any thread may send.

    Args:
        connection: one end of a pair of sockets.
    """

    def __init__(self, connection: socket.socket) -> None:
        connection.setblocking(True)
        self._connection = connection
        self._file = connection.makefile("rb")
        self._sending = threading.Lock()

    def send(self, message: Message) -> None:
        """Send it; wait while the other side reads too slowly.

        Raises:
            OSError: the other side has gone.
        """
        data = packed(message)
        with self._sending:
            self._connection.sendall(data)

    def receive(self) -> Message | None:
        """The next message; ``None`` when the other side has gone."""
        try:
            head = self._file.read(_LENGTH.size)
            if len(head) < _LENGTH.size:
                return None
            (length,) = _LENGTH.unpack(head)
            body = self._file.read(length)
        except OSError:
            return None
        if len(body) < length:
            return None
        message: Message = json.loads(body)
        return message
