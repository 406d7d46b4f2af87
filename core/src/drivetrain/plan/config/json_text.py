"""JSON with comments and trailing commas, in a time that grows with the length of the text."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from drivetrain.errors import ConfigError
from drivetrain.plan.config.limits import MAX_DEPTH, number_problem

# Every alternative takes what it has begun: a string or comment that never ends is one token, too.
# With a second try at each of its characters, a text of quotes would take the square of its length.
_TOKEN = re.compile(
    r"""
    (?P<string>"(?:\\.|[^"\\\n])*+"?+)
    |(?P<comment>//[^\n]*+|\#[^\n]*+|/\*(?:[^*]++|\*(?!/))*+(?:\*/)?+)
    |(?P<open>[\[{])
    |(?P<close>[\]}])
    |(?P<comma>,)
    |(?P<word>[^\s"\[\]{},:/\#]++)
    """,
    re.VERBOSE,
)

_SHOWN_LINES = 5


def parse_json(text: str, name: str) -> Any:
    """Parse JSON with comments and trailing commas; ``name`` is what messages call the source.

    Raises:
        ConfigError: with line and column, or the lines of a key that is given twice.
    """

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(items)
        if len(found) < len(items):
            key, _ = Counter(key for key, _ in items).most_common(1)[0]
            raise ConfigError(
                f"{name}: key {key[:60]!r} is given twice in one object (it stands on lines "
                f"{_lines_of(key, text)}); remove one"
            )
        return found

    try:
        return json.loads(_without_extras(text, name), object_pairs_hook=pairs)
    except json.JSONDecodeError as error:
        raise syntax_error(
            name, text, error.lineno, error.colno, error.msg.removesuffix(" at")
        ) from None


def syntax_error(name: str, text: str, line: int, column: int, problem: str) -> ConfigError:
    """An error that shows the part of the line (both from 1) around the place and points at it."""
    lines = text.split("\n")
    shown = lines[min(line, len(lines)) - 1]
    start = max(0, column - 60)
    excerpt = "".join(c if c.isprintable() else " " for c in shown[start : start + 80])
    return ConfigError(
        f"{name}, line {line}, column {column}: {problem[0].lower()}{problem[1:]}\n"
        f"    {excerpt}\n    {' ' * (column - 1 - start)}^"
    )


def _without_extras(text: str, name: str) -> str:
    """``text`` with blanks for comments and trailing commas, which keep every line and column."""
    extras: list[tuple[int, int]] = []
    depth = 0
    comma: tuple[int, int] | None = None  # where the last token is one
    for token in _TOKEN.finditer(text):
        kind = token.lastgroup
        if kind == "comment":
            extras.append(token.span())
            continue
        if kind == "word" and (problem := number_problem(token.group())):
            raise _error_at(token.start(), text, name, problem)
        if kind == "open":
            depth += 1
            if depth > MAX_DEPTH:
                problem = f"nested too deeply: more than {MAX_DEPTH} levels"
                raise _error_at(token.start(), text, name, problem)
        elif kind == "close":
            depth -= 1
            if comma is not None:
                extras.append(comma)
        comma = token.span() if kind == "comma" else None
    kept: list[str] = []
    end = 0
    for start, stop in sorted(extras):
        kept += [text[end:start], re.sub(r"[^\n]", " ", text[start:stop])]
        end = stop
    return "".join([*kept, text[end:]])


def _error_at(position: int, text: str, name: str, problem: str) -> ConfigError:
    line = text.count("\n", 0, position) + 1
    column = position - text.rfind("\n", 0, position)
    return syntax_error(name, text, line, column, problem)


def _lines_of(key: str, text: str) -> str:
    written = re.finditer(re.escape(json.dumps(key)) + r"\s*:", text)
    return ", ".join(map(str, islice(_line_numbers(written, text), _SHOWN_LINES)))


def _line_numbers(matches: Iterator[re.Match[str]], text: str) -> Iterator[int]:
    line, seen = 1, 0
    for match in matches:
        line += text.count("\n", seen, match.start())
        seen = match.start()
        yield line
