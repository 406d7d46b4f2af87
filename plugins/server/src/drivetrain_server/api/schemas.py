"""Requests, field by field.

Fields of OpenAI that change nothing here (``user``, ``metadata``, ...) are taken; those that ask
for something that is not there are refused by name; unknown ones are refused. Beside them stand
the sampling parameters that other servers know, too: ``top_k``, ``min_p``, ``repetition_penalty``,
``min_tokens``, ``ignore_eos``, ``stop_token_ids``.
"""

from __future__ import annotations

import math
import re
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator

_TOKEN = Annotated[int, Field(ge=0, lt=2**31)]


class Strict(BaseModel):
    """Takes no other fields and no other types."""

    model_config = ConfigDict(strict=True, extra="forbid", frozen=True)


class StreamOptions(Strict):
    """What a stream has beside results."""

    include_usage: bool = False
    include_obfuscation: bool = False


class JsonSchema(Strict):
    """A schema, and what it is called."""

    name: str = "schema"
    description: str | None = None
    json_schema: dict[str, Any] | bool = Field(default=True, alias="schema")
    strict: bool | None = None


class ResponseFormat(Strict):
    """What a result has to be."""

    type: Literal["text", "json_object", "json_schema", "regex"]
    json_schema: JsonSchema | None = None
    pattern: str | None = None

    @model_validator(mode="after")
    def _whole(self) -> ResponseFormat:
        if (self.type == "json_schema") != (self.json_schema is not None):
            raise ValueError("json_schema belongs to the type json_schema, and must be there")
        if (self.type == "regex") != (self.pattern is not None):
            raise ValueError("pattern belongs to the type regex, and must be there")
        return self

    @property
    def edits(self) -> dict[str, Any]:
        """What the worker is told."""
        if self.type == "regex":
            return {"regex": self.pattern}
        if self.json_schema is not None:
            return {"schema": self.json_schema.json_schema}
        return {"schema": {"type": "object"}} if self.type == "json_object" else {}


class Sampled(Strict):
    """What all requests that generate have in common."""

    model: str
    max_tokens: int | None = Field(default=None, ge=1)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    n: int | None = Field(default=None, ge=1, le=1024)
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    stop: str | list[str] | None = None
    presence_penalty: float | None = Field(default=None, ge=-2, le=2)
    frequency_penalty: float | None = Field(default=None, ge=-2, le=2)
    logit_bias: dict[str, float] | None = None
    seed: int | None = None
    response_format: ResponseFormat | None = None
    user: str | None = None
    metadata: dict[str, Any] | None = None
    store: bool | None = None
    service_tier: str | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    top_k: int | None = Field(default=None, ge=-1, lt=2**31)
    min_p: float | None = Field(default=None, ge=0, le=1)
    repetition_penalty: float | None = Field(default=None, gt=0, le=100)
    min_tokens: int | None = Field(default=None, ge=0, lt=2**31)
    ignore_eos: bool | None = None
    stop_token_ids: list[_TOKEN] | None = Field(default=None, max_length=64)

    @field_validator("stop")
    @classmethod
    def _few_stops(cls, stop: str | list[str] | None) -> str | list[str] | None:
        several = [stop] if isinstance(stop, str) else stop or []
        if len(several) > 16 or not all(0 < len(each) <= 256 for each in several):
            raise ValueError("at most 16 texts of 1 to 256 characters")
        return stop

    @field_validator("logit_bias")
    @classmethod
    def _bounded(cls, bias: dict[str, float] | None) -> dict[str, float] | None:
        for token, value in (bias or {}).items():
            if not re.fullmatch(r"[0-9]{1,9}", token) or not -100 <= value <= 100:
                raise ValueError("numbers of tokens, with values in [-100, 100]")
        if len(bias or {}) > 1024:
            raise ValueError("at most 1024 tokens")
        return bias

    @model_validator(mode="after")
    def _agrees(self) -> Sampled:
        if self.stream_options is not None and not self.stream:
            raise ValueError("stream_options belongs to requests with stream")
        if self.edits and (self.min_tokens or self.ignore_eos):
            raise ValueError("min_tokens and ignore_eos do not go with a response_format")
        return self

    @property
    def results(self) -> int:
        """Results of one prompt."""
        return self.n or 1

    @property
    def edits(self) -> dict[str, Any]:
        """The grammar that results are held to, if any."""
        return {} if self.response_format is None else self.response_format.edits

    def new_tokens(self) -> int | None:
        """The most that the client wants."""
        return self.max_tokens


class Function(Strict):
    """What a tool is."""

    name: str = Field(pattern=r"^[A-Za-z0-9_.-]{1,64}$")
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Strict):
    """A tool that the model may call."""

    type: Literal["function"]
    function: Function


class Chosen(Strict):
    """The name of a function."""

    name: str


class ToolChoice(Strict):
    """A tool that must be called."""

    type: Literal["function"]
    function: Chosen


class CalledFunction(Strict):
    """A call as it stands in a message."""

    name: str
    arguments: str


class ToolCall(Strict):
    """A call of an earlier answer."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: int | None = None


class TextPart(Strict):
    """A part of a message."""

    type: str
    text: str = ""

    @field_validator("type")
    @classmethod
    def _is_text(cls, type: str) -> str:
        if type not in ("text", "refusal"):
            raise ValueError(f"this model reads text, not {type}")
        return type


class Message(BaseModel):
    """One turn of a conversation; fields that only some templates know are handed on."""

    model_config = ConfigDict(strict=True, extra="allow", frozen=True)

    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: str | list[TextPart] | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = Field(default=None, max_length=128)
    tool_call_id: str | None = None

    @field_validator("content", mode="before")
    @classmethod
    def _names_what_is_no_text(cls, content: Any) -> Any:
        for part in content if isinstance(content, list) else ():
            kind = part.get("type") if isinstance(part, dict) else None
            if kind not in ("text", "refusal"):
                raise ValueError(f"this model reads text, and no part of type {kind}")
        return content


class ChatRequest(Sampled):
    """``POST /v1/chat/completions``."""

    messages: list[Message] = Field(min_length=1, max_length=4096)
    max_completion_tokens: int | None = Field(default=None, ge=1)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=20)
    tools: list[Tool] | None = Field(default=None, max_length=128)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    modalities: list[Literal["text"]] | None = None
    reasoning_effort: str | None = None
    verbosity: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None

    @model_validator(mode="after")
    def _tools_agree(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs belongs to requests with logprobs")
        names = {tool.function.name for tool in self.tools or ()}
        if len(names) < len(self.tools or ()):
            raise ValueError("two tools have one name")
        choice = self.tool_choice
        if choice not in (None, "none", "auto") and not names:
            raise ValueError("tool_choice needs tools")
        if isinstance(choice, ToolChoice) and choice.function.name not in names:
            raise ValueError(f"tool_choice names {choice.function.name!r}, which is no tool")
        if self.forced_tools and self.edits:
            raise ValueError("a result cannot be a call of a tool and have a response_format")
        return self

    @property
    def forced_tools(self) -> list[Tool]:
        """Tools of which one must be called."""
        if self.tool_choice == "required":
            return list(self.tools or ())
        if isinstance(self.tool_choice, ToolChoice):
            wanted = self.tool_choice.function.name
            return [tool for tool in self.tools or () if tool.function.name == wanted]
        return []

    def new_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens


class CompletionRequest(Sampled):
    """``POST /v1/completions``."""

    prompt: str | list[str] | list[_TOKEN] | list[list[_TOKEN]]
    logprobs: int | None = Field(default=None, ge=0, le=20)
    echo: bool | None = None
    best_of: int | None = None
    suffix: str | None = None

    @model_validator(mode="after")
    def _possible(self) -> CompletionRequest:
        if self.suffix:
            raise ValueError("suffix is not there: the model only continues texts")
        if self.best_of not in (None, self.results):
            raise ValueError("best_of must be n")
        if self.echo and self.logprobs is not None:
            raise ValueError("echo does not go with logprobs, as prompts get none")
        return self

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several prompts."""
        prompt = self.prompt
        if isinstance(prompt, str) or (prompt and isinstance(prompt[0], int)):
            return [prompt]
        return list(prompt)  # type: ignore[arg-type]


class EmbeddingRequest(Strict):
    """``POST /v1/embeddings``."""

    model: str
    input: str | list[int] | list[str] | list[list[int]]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: int | None = None
    user: str | None = None

    @property
    def prompts(self) -> list[str | list[int]]:
        """One or several texts."""
        given = self.input
        if isinstance(given, str) or (given and isinstance(given[0], int)):
            return [given]
        return list(given)  # type: ignore[arg-type]


def sampling(asked: Sampled, seed: int, logprobs: int | None) -> dict[str, Any]:
    """What the engine is told of how to sample.

    Args:
        asked: the request.
        seed: of its random numbers, if it brings none.
        logprobs: most likely tokens to tell of, or ``None``.
    """
    temperature = 1.0 if asked.temperature is None else asked.temperature
    found: dict[str, Any] = {
        "temperature": temperature if temperature >= 1e-4 or temperature == 0 else 0.0,
        "n": asked.results,
        "seed": seed if asked.seed is None else asked.seed % 2**63,
    }
    stop = [asked.stop] if isinstance(asked.stop, str) else asked.stop
    given = {
        "max_new_tokens": asked.new_tokens(),
        "top_p": asked.top_p,
        "min_p": asked.min_p,
        "top_k": None if asked.top_k is None else max(0, asked.top_k),
        "repetition_penalty": asked.repetition_penalty,
        "min_new_tokens": asked.min_tokens,
        "ignore_eos": asked.ignore_eos,
        "stop_tokens": asked.stop_token_ids,
        "stop": stop,
        "logprobs": logprobs,
    }
    found.update({name: value for name, value in given.items() if value is not None})
    assert math.isfinite(temperature)
    return found


def edits(asked: Sampled) -> dict[str, Any]:
    """What changes scores."""
    given = {
        "presence": asked.presence_penalty,
        "frequency": asked.frequency_penalty,
        "bias": asked.logit_bias,
    }
    return {**{name: value for name, value in given.items() if value}, **asked.edits}
