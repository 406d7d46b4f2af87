"""Responses that notice when their client goes away."""

from __future__ import annotations

import asyncio
import contextlib
import json
from collections.abc import AsyncGenerator, Awaitable, Callable
from contextlib import AsyncExitStack
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect, Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

T = TypeVar("T")
DONE = b"data: [DONE]\n\n"


def event(value: Any) -> bytes:
    """One event of a stream."""
    return (
        b"data: " + json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"
    )


async def unless_gone(request: Request, work: Awaitable[T]) -> T:
    """The result of ``work``, which is cancelled when the client goes.

    Raises:
        ClientDisconnect: it has gone.
    """
    task = asyncio.ensure_future(work)
    gone = asyncio.create_task(_gone(request.receive))
    try:
        await asyncio.wait({task, gone}, return_when=asyncio.FIRST_COMPLETED)
        if task.done():
            return task.result()
        raise ClientDisconnect
    finally:
        for each in (task, gone):
            each.cancel()
        await asyncio.gather(task, gone, return_exceptions=True)


class EventStream(Response):
    """Sends events as they come; closes the source when the client goes or takes nothing.

    Args:
        source: yields events; what it raises is told by ``failed``.
        failed: the event that tells of an error.
        stall_seconds: time in which the client must take an event.
        stack: closed at the end, also if the client has gone before the first event.
    """

    media_type = "text/event-stream"

    def __init__(
        self,
        source: AsyncGenerator[bytes],
        failed: Callable[[Exception], bytes],
        stall_seconds: float,
        stack: AsyncExitStack,
    ) -> None:
        super().__init__(headers={"Cache-Control": "no-cache", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._source, self._failed, self._stall = source, failed, stall_seconds
        self._stack = stack

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        sending = asyncio.create_task(self._send(send))
        gone = asyncio.create_task(_gone(receive))
        try:
            await asyncio.wait({sending, gone}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            for each in (sending, gone):
                each.cancel()
            await asyncio.gather(sending, gone, return_exceptions=True)
            await self._source.aclose()
            await self._stack.aclose()

    async def _send(self, send: Send) -> None:
        head = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        await send(head)
        with contextlib.suppress(OSError, TimeoutError):  # the client has gone, or takes nothing
            try:
                async for data in self._source:
                    await self._piece(send, data)
            except (OSError, TimeoutError):
                raise
            except Exception as error:  # noqa: BLE001 - the client is told
                await self._piece(send, self._failed(error))
            await self._piece(send, b"", more=False)

    async def _piece(self, send: Send, data: bytes, *, more: bool = True) -> None:
        async with asyncio.timeout(self._stall):
            await send({"type": "http.response.body", "body": data, "more_body": more})


async def _gone(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
