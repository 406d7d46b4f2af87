"""Finds a number in what a command has printed: in JSON, or in a table."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

SEPARATOR = " > "
_IN_COLUMNS = re.compile(r"\S+(?: \S+)*")
"""A cell has single spaces inside, and at least two around."""
_NUMBER = re.compile(r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][-+]?\d+)?")


def figure(output: str, place: str) -> float | None:
    """The number at a place of an output; ``None`` where it is not.

    Args:
        output: all that a command has written.
        place: keys of JSON from the outside in, or title (where there are several tables), row and
            column of a table, joined by ``" > "``.
    """
    path = place.split(SEPARATOR)
    found = (_at(document, path) for document in _documents(output))
    number = next((value for value in found if value is not None), None)
    return number if number is not None else _in_tables(output, path)


def _documents(output: str) -> Iterator[Any]:
    """Every JSON object or list that begins a line."""
    decoder, at = json.JSONDecoder(), 0
    for start in re.finditer(r"^[ \t]*(?=[{\[])", output, re.MULTILINE):
        if start.end() < at:
            continue  # inside of one that was read
        try:
            document, at = decoder.raw_decode(output, start.end())
        except ValueError:
            continue
        yield document


def _at(document: Any, path: Sequence[str]) -> float | None:
    for key in path:
        if isinstance(document, dict) and key in document:
            document = document[key]
        elif isinstance(document, list) and key.isdecimal() and int(key) < len(document):
            document = document[int(key)]
        else:
            return None
    is_number = isinstance(document, int | float) and not isinstance(document, bool)
    return float(document) if is_number else None


# -- tables ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class _Cell:
    text: str
    begin: int
    end: int

    def below(self, head: _Cell) -> bool:
        """Whether they share a column of characters."""
        return self.begin < head.end and head.begin < self.end


@dataclass
class _Table:
    title: str
    head: list[_Cell]
    rows: dict[str, list[_Cell]] = field(default_factory=dict)

    def number(self, row: str, column: str) -> float | None:
        """The first number in a cell."""
        heads = [head for head in self.head if head.text == column]
        for cell in self.rows.get(row, []):
            if heads and cell.below(heads[0]):
                found = _NUMBER.search(cell.text)
                return float(found[0].replace(",", "")) if found else None
        return None


def _in_tables(output: str, path: Sequence[str]) -> float | None:
    if len(path) not in (2, 3):
        return None
    *title, row, column = path
    wanted = (table for table in _tables(output) if not title or table.title == title[0])
    found = (table.number(row, column) for table in wanted)
    return next((number for number in found if number is not None), None)


def _tables(output: str) -> Iterator[_Table]:
    """Tables in Markdown; and in columns, below a head and a title that begins its line."""
    title, table = "", None
    for line in output.splitlines():
        cells = _cells(line)
        if len(cells) < 2:
            if table is not None:
                yield table
            title, table = line.strip() or title, None
        elif table is None:
            table = _Table(title, cells)
        else:
            table.rows[cells[0].text] = cells[1:]
    if table is not None:
        yield table


def _cells(line: str) -> list[_Cell]:
    """What stands in a line: between bars, each as wide as one, or between gaps."""
    if line.lstrip().startswith("|"):
        texts = line.strip().strip("|").split("|")
        return [_Cell(text.strip(), at, at + 1) for at, text in enumerate(texts)]
    return [_Cell(found[0], *found.span()) for found in _IN_COLUMNS.finditer(line)]
