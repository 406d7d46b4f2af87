"""A request on its way through a worker, as the server sees it."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from typing import Any

from drivetrain.errors import DrivetrainError
from drivetrain_server.workers.wire import Message


class WorkerLostError(DrivetrainError, RuntimeError):
    """The worker of a request has died, or was ended because it stood still."""


class RefusedError(DrivetrainError, ValueError):
    """A worker says why it does not serve a request.

    Args:
        message: for the client.
        status: of HTTP.
        code: a word for programs, or ``None``.
    """

    def __init__(self, message: str, status: int, code: str | None) -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass(frozen=True)
class Part:
    """What has come for one result.

    Args:
        index: which result of the request.
        text: new text; of embeddings the vectors, a line of base64 each.
        tokens: how many tokens it took.
        reason: why the result has ended, or ``None``.
        cached: tokens of the prompt that the cache had, once the result has ended.
        logprobs: one (text, log-probability, [(text, log-probability)]) for each token.
    """

    index: int
    text: str
    tokens: int
    reason: str | None
    cached: int
    logprobs: tuple[Any, ...] = ()


class Ticket:
    """Receives what a worker says about one request.

    Args:
        order: what the worker was asked for.
        results: how many it makes.
        leave: called once when the request is over, with whether the worker knows it is.
    """

    def __init__(self, order: Message, results: int, leave: Callable[[Ticket, bool], None]) -> None:
        self.order, self.results, self.prompt_tokens = order, results, 0
        self._leave: Callable[[Ticket, bool], None] | None = leave
        self._running = results
        self._begun: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._news: asyncio.Queue[Part | Exception] = asyncio.Queue()

    async def begun(self) -> int:
        """Wait until the engine has the request; return the number of tokens of its prompt.

        Raises:
            RefusedError: it cannot be served.
            WorkerLostError: its worker has died.
        """
        self.prompt_tokens = await asyncio.shield(self._begun)
        return self.prompt_tokens

    async def parts(self) -> AsyncIterator[Part]:
        """Yield what comes, until all results have ended.

        A reader that is slow gets several tokens of one result as one part.

        Raises:
            WorkerLostError: its worker has died.
        """
        left = self.results
        while left:
            for news in _joined(await self._taken()):
                if isinstance(news, Exception):
                    raise news
                left -= news.reason is not None
                yield news

    def close(self) -> None:
        """Stop caring: a request that still runs is cancelled."""
        self._end(known=not self._running)
        if self._begun.done() and not self._begun.cancelled():
            self._begun.exception()  # whoever asked has left, and nobody is to be warned

    async def _taken(self) -> list[Part | Exception]:
        taken = [await self._news.get()]
        while not self._news.empty():
            taken.append(self._news.get_nowait())
        return taken

    # -- called by the replica ------------------------------------------------------------------

    def begin(self, prompt_tokens: int) -> None:
        """Note that the engine has it."""
        if not self._begun.done():
            self._begun.set_result(prompt_tokens)

    def add(self, part: Part) -> None:
        """Hand a part to the reader."""
        self._news.put_nowait(part)
        self._running -= part.reason is not None
        if not self._running:
            self._end(known=True)

    def fail(self, error: Exception) -> None:
        """End it with an error."""
        if self._begun.done():
            self._news.put_nowait(error)
        else:
            self._begun.set_exception(error)
        self._end(known=True)

    def _end(self, *, known: bool) -> None:
        if self._leave is not None:
            leave, self._leave = self._leave, None
            leave(self, known)


def _joined(news: list[Part | Exception]) -> list[Part | Exception]:
    """The same news in order, where parts of one result that follow each other are one."""
    found: list[Part | Exception] = []
    last: dict[int, int] = {}
    for each in news:
        if isinstance(each, Exception):
            found.append(each)
            continue
        place = last.get(each.index)
        if place is None:
            last[each.index] = len(found)
            found.append(each)
            continue
        before = found[place]
        assert isinstance(before, Part)
        found[place] = Part(
            each.index,
            before.text + each.text,
            before.tokens + each.tokens,
            each.reason,
            each.cached,
            (*before.logprobs, *each.logprobs),
        )
    return found
