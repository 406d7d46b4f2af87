"""``POST /v1/chat/completions``."""

from __future__ import annotations

import json
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
from drivetrain_server.api.schemas import ChatRequest, Message
from drivetrain_server.api.streams import DONE, EventStream, event, unless_gone
from drivetrain_server.api.tools import Call, ToolReader, schema_of_calls
from drivetrain_server.templates.renderer import Renderer


class Chat:
    """Answers conversations.

    Args:
        generator: begins requests.
        renderer: turns messages into a prompt; ``None`` if the model has no template.
    """

    def __init__(self, generator: Generator, renderer: Renderer | None) -> None:
        self._generator, self._renderer = generator, renderer

    async def __call__(self, request: Request) -> Response:
        settings = self._generator.settings
        asked = await read(
            request, ChatRequest, most=settings.max_body, seconds=settings.body_seconds
        )
        self._generator.check(asked, 1)
        stack = AsyncExitStack()
        try:
            generation = await unless_gone(request, self._begin(asked, stack))
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

    async def _begin(self, asked: ChatRequest, stack: AsyncExitStack) -> Generation:
        if self._renderer is None:
            raise ApiError(
                400,
                "the model has no chat template; use /v1/completions, or start the server with "
                "--chat-template",
                code="no_chat_template",
            )
        tools = None
        if asked.tools and asked.tool_choice != "none":
            tools = [tool.model_dump(exclude_none=True) for tool in asked.tools]
        messages = [as_template_sees(message) for message in asked.messages]
        options = asked.chat_template_kwargs or {}
        prompt = await self._renderer.render(messages, tools, options)
        edits: dict[str, Any] = {}
        if asked.forced_tools:
            functions = [tool.function for tool in asked.forced_tools]
            edits["schema"] = schema_of_calls((each.name, each.parameters) for each in functions)
        top = (asked.top_logprobs or 0) if asked.logprobs else None
        begun = self._generator.begun(asked, [prompt], special=False, logprobs=top, edits=edits)
        return await stack.enter_async_context(begun)


class _Answer:
    """Results of one conversation, at once or in events."""

    def __init__(self, asked: ChatRequest, model: str, generation: Generation) -> None:
        self._asked, self._generation = asked, generation
        usable = asked.tools if asked.tools and asked.tool_choice != "none" else []
        self._tools = [tool.function.name for tool in usable]
        self._head = {
            "id": f"chatcmpl-{secrets.token_hex(12)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": model,
        }

    def body(self, results: list[Result]) -> dict[str, Any]:
        """The answer at once."""
        choices = [self._choice(index, result) for index, result in enumerate(results)]
        return {**self._head, "choices": choices, "usage": self._generation.usage.body}

    def _choice(self, index: int, result: Result) -> dict[str, Any]:
        message: dict[str, Any] = {"role": "assistant", "content": result.text, "refusal": None}
        reason = result.reason
        if self._tools:
            reader = ToolReader(self._tools)
            pieces = [*reader.feed(result.text), *reader.finish()]
            calls = [each for each in pieces if isinstance(each, Call)]
            text = "".join(each for each in pieces if isinstance(each, str))
            if calls:
                message["content"] = text or None
                message["tool_calls"] = [_call(call) for call in calls]
                reason = "tool_calls" if reason == "stop" else reason
        return {
            "index": index,
            "message": message,
            "logprobs": _logprobs(result.logprobs) if self._asked.logprobs else None,
            "finish_reason": reason,
        }

    async def events(self) -> AsyncGenerator[bytes]:
        """The answer as it grows."""
        options = self._asked.stream_options
        with_usage = options is not None and options.include_usage
        head = {**self._head, "object": "chat.completion.chunk"}
        blank: dict[str, Any] = {"usage": None} if with_usage else {}

        def chunk(index: int, delta: dict[str, Any], reason: str | None, places: Any) -> bytes:
            choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": places}
            return event({**head, **blank, "choices": [choice]})

        readers = [ToolReader(self._tools) for _ in range(self._generation.results)]
        for index in range(self._generation.results):
            yield chunk(index, {"role": "assistant", "content": ""}, None, None)
        async for part in self._generation.parts():
            reader = readers[part.index]
            pieces: list[str | Call] = [part.text] if part.text else []
            if self._tools:
                pieces = reader.feed(part.text)
                if part.reason is not None:
                    pieces += reader.finish()
            places = _logprobs(list(part.logprobs)) if part.logprobs else None
            before = reader.calls - sum(isinstance(each, Call) for each in pieces)
            for piece in pieces or ([""] if places else []):
                delta: dict[str, Any] = {"content": piece}
                if isinstance(piece, Call):
                    delta = {"tool_calls": [{"index": before, **_call(piece)}]}
                    before += 1
                yield chunk(part.index, delta, None, places)
                places = None
            if part.reason is not None:
                reason = REASONS[part.reason]
                reason = "tool_calls" if reader.calls and reason == "stop" else reason
                yield chunk(part.index, {}, reason, None)
        if with_usage:
            yield event({**head, "choices": [], "usage": self._generation.usage.body})
        yield DONE


def as_template_sees(message: Message) -> dict[str, Any]:
    """A message as chat templates expect it: text in one piece, arguments as objects."""
    seen = message.model_dump(exclude_none=True)
    if isinstance(message.content, list):
        seen["content"] = "".join(part.text for part in message.content)
    elif message.content is None:
        seen["content"] = ""
    if message.role == "developer":
        seen["role"] = "system"
    for call in seen.get("tool_calls", ()):
        call.pop("index", None)
        try:
            call["function"]["arguments"] = json.loads(call["function"]["arguments"] or "{}")
        except ValueError as error:
            raise ApiError(
                400, f"arguments of a call are not JSON: {error}", param="messages"
            ) from error
    return seen


def _call(call: Call) -> dict[str, Any]:
    function = {"name": call.name, "arguments": call.arguments}
    return {"id": call.id, "type": "function", "function": function}


def _logprobs(places: list[Any]) -> dict[str, Any]:
    content = [
        {**_token(text, chosen), "top_logprobs": [_token(*each) for each in top]}
        for text, chosen, top in places
    ]
    return {"content": content, "refusal": None}


def _token(text: str, logprob: float) -> dict[str, Any]:
    whole = "\N{REPLACEMENT CHARACTER}" not in text
    return {
        "token": text,
        "logprob": max(logprob, -9999.0),
        "bytes": list(text.encode()) if whole else None,
    }
