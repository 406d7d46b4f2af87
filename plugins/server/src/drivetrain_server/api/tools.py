"""Calls of tools in what a model writes.

Models differ in how they write them. Read are: ``<tool_call>{...}</tool_call>`` (Hermes, Qwen,
SmolLM), ``<function=name>{...}</function>`` (Llama 3.1), ``[TOOL_CALLS][...]`` (Mistral),
``<|python_tag|>{...}`` and a text that is nothing but JSON with a name and arguments (Llama 3, and
results that are held to a schema).
"""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

_PAIRS = {"<tool_call>": "</tool_call>", "<function=": "</function>"}
_OPENINGS = ("<tool_call>", "<function=", "[TOOL_CALLS]", "<|python_tag|>")
_FUNCTION = re.compile(r"([A-Za-z0-9_.-]{1,64})>(.*)", re.DOTALL)


@dataclass(frozen=True)
class Call:
    """A call of a tool.

    Args:
        name: of the function.
        arguments: JSON.
        id: by which its result is known later.
    """

    name: str
    arguments: str
    id: str = field(default_factory=lambda: f"call_{secrets.token_hex(12)}")


class ToolReader:
    """Tells text from calls while a result grows.

    Args:
        names: tools that there are; what calls another one is text.
    """

    def __init__(self, names: Iterable[str]) -> None:
        self._names = frozenset(names)
        self._held, self._opening = "", ""
        self._at_start, self._after_call = True, False
        self.calls = 0

    def feed(self, text: str) -> list[str | Call]:
        """Add text; return what is certain."""
        self._held += text
        found: list[str | Call] = []
        while self._advance(found):
            pass
        return self._counted(found)

    def finish(self) -> list[str | Call]:
        """Return the rest."""
        held, opening = self._held, self._opening
        self._held, self._opening = "", ""
        if not held and not opening:
            return []
        body = held
        if opening in _PAIRS:
            body = held.removesuffix(_PAIRS[opening])
        calls = self._read(opening, body) if opening else []
        whole = ("" if opening == "{" else opening) + held
        return self._counted([*calls] if calls else [whole])

    def _advance(self, found: list[str | Call]) -> bool:
        """Take one step; whether there may be another."""
        if self._opening in _PAIRS:
            end = _PAIRS[self._opening]
            body, closed, rest = self._held.partition(end)
            if not closed:
                return False
            calls = self._read(self._opening, body)
            found += calls or [self._opening + body + end]
            self._held, self._opening, self._after_call = rest, "", bool(calls)
            return True
        if self._opening:
            return False  # to the end of the result
        if self._after_call:  # space between calls is no text
            self._held = self._held.lstrip()
            self._after_call = not self._held
        if self._at_start:
            stripped = self._held.lstrip()
            if not stripped or (stripped[0] == "[" and "[TOOL_CALLS]".startswith(stripped)):
                return False
            self._at_start = False
            if stripped[0] == "{" or (stripped[0] == "[" and stripped[:12] != "[TOOL_CALLS]"):
                self._opening = "{"
                return False
        places = [(self._held.find(each), each) for each in _OPENINGS if each in self._held]
        if places:
            place, self._opening = min(places)
            before, self._held = self._held[:place], self._held[place + len(self._opening) :]
            if before.strip():
                found.append(before)
            return True
        keep = max((n for o in _OPENINGS for n in range(1, len(o)) if self._held.endswith(o[:n])),
                   default=0)  # fmt: skip
        certain = self._held[: len(self._held) - keep]
        if certain:
            found.append(certain)
            self._held = self._held[len(certain) :]
        return False

    def _read(self, opening: str, body: str) -> list[str | Call]:
        if opening == "<function=":
            match = _FUNCTION.fullmatch(body.strip())
            if match is None:
                return []
            return self._calls([{"name": match[1], "arguments": _json(match[2])}])
        value = _json(body)
        return self._calls(value if isinstance(value, list) else [value])

    def _calls(self, values: list[Any]) -> list[str | Call]:
        calls: list[str | Call] = []
        for value in values:
            if not isinstance(value, dict) or value.get("name") not in self._names:
                return []
            arguments = value.get("arguments", value.get("parameters", {}))
            if isinstance(arguments, str):
                arguments = _json(arguments)
            if not isinstance(arguments, dict):
                return []
            calls.append(Call(value["name"], json.dumps(arguments, ensure_ascii=False)))
        return calls

    def _counted(self, found: list[str | Call]) -> list[str | Call]:
        self.calls += sum(isinstance(each, Call) for each in found)
        return found


def schema_of_calls(tools: Iterable[tuple[str, dict[str, Any] | None]]) -> dict[str, Any]:
    """The schema of a call of one of ``tools``, given as (name, schema of arguments)."""
    kinds, shared = list[Any](), dict[str, dict[str, Any]]()
    for name, parameters in tools:
        own = dict(parameters or {"type": "object"})
        for where in ("$defs", "definitions"):  # references count from the root
            shared.setdefault(where, {}).update(own.pop(where, {}))
        kinds.append(
            {
                "type": "object",
                "properties": {"name": {"const": name}, "arguments": own},
                "required": ["name", "arguments"],
                "additionalProperties": False,
            }
        )
    whole = kinds[0] if len(kinds) == 1 else {"anyOf": kinds}
    return {**{where: known for where, known in shared.items() if known}, **whole}


def _json(text: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
