"""Docstrings in the style of Google, as Markdown."""

from __future__ import annotations

import inspect
import re
from dataclasses import dataclass, field
from typing import Any

_SECTIONS = ("Args", "Attributes", "Class attributes", "Returns", "Raises", "Yields")


@dataclass
class Docstring:
    """The parts of a docstring.

    Args:
        text: what comes before the sections, as Markdown.
        sections: section -> (name, meaning) of each of its items; without names, the text alone.
    """

    text: str = ""
    sections: dict[str, list[tuple[str, str]]] = field(default_factory=dict)

    @classmethod
    def of(cls, thing: Any) -> Docstring:
        """The docstring of an object, its own or that of the method it implements."""
        return cls.parse(inspect.getdoc(thing) or "")

    @classmethod
    def parse(cls, text: str) -> Docstring:
        """Split a docstring, whose indentation is gone already."""
        found, section, lines = cls(), "", list[str]()
        for line in [*text.splitlines(), "end"]:
            named = re.fullmatch(rf"({'|'.join(_SECTIONS)}):", line)
            if section and line and not line.startswith(" "):
                found.sections[section] = _items(lines)
                section, lines = "", []
            if named:
                section = named[1]
            elif section:
                lines.append(line)
            elif line != "end":
                found.text += f"{line}\n"
        found.text = _markdown(found.text.strip())
        return found

    @property
    def first(self) -> str:
        """The first sentence or paragraph."""
        return self.text.partition("\n\n")[0]

    def meanings(self) -> dict[str, str]:
        """Name -> meaning, of arguments and attributes."""
        named = ("Args", "Attributes", "Class attributes")
        return {name: text for key in named for name, text in self.sections.get(key, [])}


def _items(lines: list[str]) -> list[tuple[str, str]]:
    items: list[tuple[str, str]] = []
    for line in inspect.cleandoc("\n".join(["", *lines])).splitlines():
        named = re.match(r"([\w*.]+)(?: \([^)]*\))?: (.*)", line)
        if named and not line.startswith(" "):
            items.append((named[1], named[2]))
        elif items:
            items[-1] = (items[-1][0], f"{items[-1][1]} {line.strip()}".strip())
        elif line:
            items.append(("", line.strip()))
    return [(name, one_line(text)) for name, text in items]


def _markdown(text: str) -> str:
    """Literal blocks fenced, inline markup translated."""
    parts = re.split(r"::\n\n((?:(?: {4}.*)?\n)+(?: {4}.*)?)", text)
    shown = ""
    for number, part in enumerate(parts):
        if number % 2:
            code = inspect.cleandoc("\n" + part.rstrip())
            shown = f"{shown.rstrip()}\n\n```python\n{code}\n```\n\n"
        else:
            shown += prose(part)
    return shown.strip()


def one_line(text: str) -> str:
    """Text for a table cell: one line, with markup of Markdown."""
    return prose(" ".join(text.split())).replace("|", "\\|")


def prose(text: str) -> str:
    """Markup of docstrings as Markdown: one backtick instead of two, no roles."""
    text = re.sub(r":\w+:`~?([^`]+)`", lambda m: f"`{m[1].rpartition('.')[2]}`", text)
    return re.sub(r"(?<!`)``(?!`)", "`", text)
