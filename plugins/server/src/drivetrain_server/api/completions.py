"""``POST /v1/completions``."""

from __future__ import annotations

import secrets
import time
from collections.abc import AsyncGenerator
from contextlib import AsyncExitStack
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from drivetrain_server.api.body import read
from drivetrain_server.api.errors import ApiError, as_api_error
from drivetrain_server.api.generation import REASONS, Generation, Generator, Result
from drivetrain_server.api.schemas import CompletionRequest
from drivetrain_server.api.streams import DONE, EventStream, event, unless_gone


class Completions:
    """Continues texts.

    Args:
        generator: begins requests.
    """

    def __init__(self, generator: Generator) -> None:
        self._generator = generator

    async def __call__(self, request: Request) -> Response:
        settings = self._generator.settings
        asked = await read(
            request, CompletionRequest, most=settings.max_body, seconds=settings.body_seconds
        )
        if not asked.prompts or not all(asked.prompts):
            raise ApiError(400, "the prompt is empty", param="prompt", code="invalid_value")
        if asked.echo and not all(isinstance(each, str) for each in asked.prompts):
            raise ApiError(400, "echo needs prompts that are text", param="echo")
        self._generator.check(asked, len(asked.prompts))
        stack = AsyncExitStack()
        try:
            begun = self._generator.begun(
                asked, asked.prompts, special=True, logprobs=asked.logprobs
            )
            generation = await unless_gone(request, stack.enter_async_context(begun))
            answer = _Answer(asked, asked.model, generation)
            if asked.stream:
                return EventStream(
                    answer.events(),
                    lambda error: event(as_api_error(error).body),
                    settings.stall_seconds,
                    stack.pop_all(),
                )
            return JSONResponse(answer.body(await unless_gone(request, generation.whole())))
        finally:
            await stack.aclose()


class _Answer:
    """Results of some prompts, at once or in events."""

    def __init__(self, asked: CompletionRequest, model: str, generation: Generation) -> None:
        self._asked, self._generation = asked, generation
        self._head = {
            "id": f"cmpl-{secrets.token_hex(12)}",
            "object": "text_completion",
            "created": int(time.time()),
            "model": model,
        }

    def _before(self, index: int) -> str:
        if not self._asked.echo:
            return ""
        return str(self._asked.prompts[index // self._asked.results])

    def body(self, results: list[Result]) -> dict[str, Any]:
        """The answer at once."""
        choices = [
            {
                "index": index,
                "text": self._before(index) + result.text,
                "logprobs": self._logprobs(result.logprobs, 0),
                "finish_reason": result.reason,
            }
            for index, result in enumerate(results)
        ]
        return {**self._head, "choices": choices, "usage": self._generation.usage.body}

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as it grows."""
        options = self._asked.stream_options
        with_usage = options is not None and options.include_usage
        blank: dict[str, Any] = {"usage": None} if with_usage else {}
        lengths = [0] * self._generation.results
        begun = [False] * self._generation.results
        async for part in self._generation.parts():
            index = part.index
            text = part.text if begun[index] else self._before(index) + part.text
            begun[index] = True
            places = self._logprobs(list(part.logprobs), lengths[index])
            lengths[index] += sum(len(place[0]) for place in part.logprobs)
            if not text and not part.logprobs and part.reason is None:
                continue
            choice = {
                "index": index,
                "text": text,
                "logprobs": places,
                "finish_reason": None if part.reason is None else REASONS[part.reason],
            }
            yield event({**self._head, **blank, "choices": [choice]})
        if with_usage:
            yield event({**self._head, "choices": [], "usage": self._generation.usage.body})
        yield DONE

    def _logprobs(self, places: list[Any], offset: int) -> dict[str, Any] | None:
        if self._asked.logprobs is None:
            return None
        offsets = list[int]()
        for text, _, _ in places:
            offsets.append(offset)
            offset += len(text)
        return {
            "tokens": [text for text, _, _ in places],
            "token_logprobs": [max(chosen, -9999.0) for _, chosen, _ in places],
            "top_logprobs": [
                {text: max(value, -9999.0) for text, value in top} for _, _, top in places
            ],
            "text_offset": offsets,
        }
