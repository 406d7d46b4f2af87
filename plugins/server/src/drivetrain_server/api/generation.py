"""What chat and plain completions share: from a checked request to results that grow."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections.abc import AsyncGenerator, AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from drivetrain_server.api import schemas
from drivetrain_server.api.errors import ApiError
from drivetrain_server.metrics import Metrics
from drivetrain_server.settings import Settings
from drivetrain_server.workers.router import Router
from drivetrain_server.workers.tickets import Part, Ticket

REASONS = {"stop": "stop", "length": "length", "deadline": "length", "cancelled": "stop"}
"""Why a result has ended, in the words of the protocol."""


@dataclass
class Usage:
    """Tokens of a request."""

    prompt: int = 0
    completion: int = 0
    cached: int = 0

    @property
    def body(self) -> dict[str, Any]:
        """As the protocol has it."""
        return {
            "prompt_tokens": self.prompt,
            "completion_tokens": self.completion,
            "total_tokens": self.prompt + self.completion,
            "prompt_tokens_details": {"cached_tokens": self.cached},
        }


@dataclass
class Result:
    """One whole result."""

    text: str = ""
    reason: str = "stop"
    logprobs: list[Any] = field(default_factory=list)

    def add(self, part: Part) -> None:
        """Take in what has come."""
        self.text += part.text
        self.logprobs += part.logprobs
        if part.reason is not None:
            self.reason = REASONS[part.reason]


class Generation:
    """Requests for one or several prompts that have begun.

    Args:
        tickets: one for each prompt.
        each: results of one prompt.
        metrics: told how long they take.
    """

    def __init__(self, tickets: Sequence[Ticket], each: int, metrics: Metrics) -> None:
        self._tickets, self._each, self._metrics = tickets, each, metrics
        self._began = time.monotonic()
        self.results = len(tickets) * each
        self.usage = Usage(prompt=sum(ticket.prompt_tokens for ticket in tickets))

    async def parts(self) -> AsyncGenerator[Part]:
        """Yield what comes; results of the second prompt are numbered after those of the first."""
        if len(self._tickets) == 1:
            async for part in self._tickets[0].parts():
                yield self._noted(part)
            return
        news: asyncio.Queue[Part | Exception | None] = asyncio.Queue()

        async def forward(place: int, ticket: Ticket) -> None:
            try:
                async for part in ticket.parts():
                    index = place * self._each + part.index
                    news.put_nowait(
                        Part(index, part.text, part.tokens, part.reason, part.cached, part.logprobs)
                    )
                news.put_nowait(None)
            except Exception as error:  # noqa: BLE001 - whoever reads gets it
                news.put_nowait(error)

        tasks = [asyncio.create_task(forward(*item)) for item in enumerate(self._tickets)]
        try:
            left = len(tasks)
            while left:
                item = await news.get()
                if isinstance(item, Exception):
                    raise item
                left -= item is None
                if item is not None:
                    yield self._noted(item)
        finally:
            for task in tasks:
                task.cancel()

    async def whole(self) -> list[Result]:
        """All results, when they have ended."""
        results = [Result() for _ in range(self.results)]
        async for part in self.parts():
            results[part.index].add(part)
        return results

    def close(self) -> None:
        """Cancel what still runs."""
        for ticket in self._tickets:
            ticket.close()
        self._metrics.note_request_end(time.monotonic() - self._began)

    def _noted(self, part: Part) -> Part:
        if part.tokens and not self.usage.completion:
            self._metrics.note_first_token(time.monotonic() - self._began)
        self.usage.completion += part.tokens
        if part.reason is not None and part.index % self._each == 0:
            self.usage.cached += part.cached
        return part


class Generator:
    """Begins requests.

    Args:
        settings: limits.
        router: where they go.
        metrics: told of them.
    """

    def __init__(self, settings: Settings, router: Router, metrics: Metrics) -> None:
        self.settings, self.router, self.metrics = settings, router, metrics

    def check(self, asked: schemas.Sampled, prompts: int) -> None:
        """Refuse what is no request for this server, before anything is computed.

        Raises:
            ApiError: it is too much, or for another model.
        """
        settings = self.settings
        self.check_model(asked.model)
        results = prompts * asked.results
        if results > settings.max_results:
            raise ApiError(
                400,
                f"the request asks for {results} results, and at most {settings.max_results} may "
                "be asked for at once",
                param="n",
                code="invalid_value",
            )
        wanted = asked.new_tokens()
        if wanted is not None and wanted > settings.max_tokens:
            raise ApiError(
                400,
                f"max_tokens is {wanted}, and this server makes at most {settings.max_tokens}",
                param="max_tokens",
                code="invalid_value",
            )
        for kind, value in asked.edits.items():
            if len(str(value)) > settings.max_schema:
                raise ApiError(
                    400,
                    f"the {kind} has more than {settings.max_schema} characters",
                    param="response_format",
                    code="invalid_value",
                )
        self.router.admit(results)

    def check_model(self, name: str) -> None:
        """Refuse another model's name.

        Raises:
            ApiError: it is another one.
        """
        if name != self.settings.name and name not in self.router.shelf.paths:
            known = ", ".join(map(repr, [self.settings.name, *self.router.shelf.paths]))
            raise ApiError(
                404,
                f"there is no model {name[:200]!r} here; this server has {known}",
                param="model",
                code="model_not_found",
            )

    @asynccontextmanager
    async def begun(
        self,
        asked: schemas.Sampled,
        prompts: Sequence[str | list[int]],
        *,
        special: bool,
        logprobs: int | None,
        edits: Mapping[str, Any] | None = None,
    ) -> AsyncIterator[Generation]:
        """Requests that the engine has taken; whoever leaves cancels what still runs.

        Args:
            asked: the request.
            prompts: texts or tokens.
            special: whether the tokenizer adds its special tokens to texts.
            logprobs: most likely tokens to tell of, or ``None``.
            edits: what changes scores, beside what the request says.
        """
        tickets: list[Ticket] = []
        generation: Generation | None = None
        other = {} if asked.model == self.settings.name else {"adapter": asked.model}
        try:
            for prompt in prompts:
                order = {
                    "prompt": prompt,
                    "special": special,
                    "most": self.settings.max_tokens,
                    "sampling": {
                        **schemas.sampling(asked, secrets.randbits(62), logprobs),
                        **other,
                    },
                    "edits": {**schemas.edits(asked), **(edits or {})},
                    "timeout": self.settings.request_seconds,
                }
                tickets.append(self.router.submit(order, asked.results))
            for ticket in tickets:
                await ticket.begun()
            generation = Generation(tickets, asked.results, self.metrics)
            self.metrics.note_prompt(generation.usage.prompt)
            yield generation
        finally:
            if generation is not None:
                generation.close()
            for ticket in tickets:
                ticket.close()
