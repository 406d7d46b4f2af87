"""Rendering a chat template of a model, which is a program that somebody else wrote.

It runs in Jinja's immutable sandbox: no attributes with underscores, no changes of what it is
given, no files. Names and filters are those that Transformers gives to templates.
"""

from __future__ import annotations

import datetime as dt
import json
from collections.abc import Mapping
from typing import Any

from jinja2 import TemplateError, nodes
from jinja2.exceptions import SecurityError
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

MOST_TEXT = 8 * 2**20
"""Characters of a rendered prompt."""


class BadTemplateError(ValueError):
    """A template cannot be read, or fails."""


class _Generation(Extension):
    """``{% generation %}`` marks what the assistant says; here it only shows its body."""

    tags = {"generation"}  # noqa: RUF012 - as Jinja declares it

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Environment(ImmutableSandboxedEnvironment):
    intercepted_binops = frozenset({"*", "**"})

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        sizes = [len(each) for each in (left, right) if hasattr(each, "__len__")]
        numbers = [abs(each) for each in (left, right) if isinstance(each, int | float)]
        if (sizes and numbers and sizes[0] * numbers[0] > MOST_TEXT) or (
            operator == "**" and max(numbers, default=0) > 1024
        ):
            raise SecurityError(f"{operator} would make a value of unreasonable size")
        return super().call_binop(context, operator, left, right)


def _fail(message: str) -> None:
    raise TemplateError(message)


def _json(value: Any, indent: int | None = None, **_: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=indent)


def _now(form: str) -> str:
    return dt.datetime.now().astimezone().strftime(form)


class ChatTemplate:
    """A template of a model.

    Args:
        source: its text; or several by name, of which ``default`` and ``tool_use`` are used.
        tokens: special tokens by name, such as ``bos_token``.

    Raises:
        BadTemplateError: it cannot be read.
    """

    def __init__(self, source: str | Mapping[str, str], tokens: Mapping[str, Any]) -> None:
        environment = _Environment(
            trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
        )
        environment.filters["tojson"] = _json
        environment.globals.update(raise_exception=_fail, strftime_now=_now)
        named = {"default": source} if isinstance(source, str) else dict(source)
        try:
            self._templates = {name: environment.from_string(t) for name, t in named.items()}
        except (TemplateError, RecursionError) as error:
            raise BadTemplateError(f"the chat template cannot be read: {error}") from error
        self._tokens = dict(tokens)

    def render(
        self, messages: list[Any], tools: list[Any] | None, options: Mapping[str, Any]
    ) -> str:
        """The prompt for ``messages``.

        Raises:
            BadTemplateError: the template fails on them.
        """
        wanted = "tool_use" if tools and "tool_use" in self._templates else "default"
        if (template := self._templates.get(wanted)) is None:
            raise BadTemplateError("the model has no default chat template")
        given = {"add_generation_prompt": True, **self._tokens, **options}
        pieces, size = [], 0
        try:
            for piece in template.generate(messages=messages, tools=tools, documents=None, **given):
                size += len(piece)
                if size > MOST_TEXT:
                    raise BadTemplateError(f"the prompt has more than {MOST_TEXT} characters")
                pieces.append(piece)
        except BadTemplateError:
            raise
        except Exception as error:
            raise BadTemplateError(f"the chat template fails on these messages: {error}") from error
        return "".join(pieces)
