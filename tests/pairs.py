"""Rows of values that contain every pair of two features' values."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import combinations, product
from typing import Any


def all_pairs(values: Mapping[str, Sequence[Any]]) -> Iterator[dict[str, Any]]:
    """Few rows that contain every pair of values of two features (greedy)."""
    names = sorted(values)
    missing = {
        (a, x, b, y)
        for a, b in combinations(names, 2)
        for x, y in product(range(len(values[a])), range(len(values[b])))
    }
    while missing:
        a, x, b, y = min(missing)
        row = {a: x, b: y}
        for name in names:
            if name not in row:
                row[name] = max(
                    range(len(values[name])),
                    key=lambda choice, name=name, row=row: sum(
                        (*pair(name, choice, other, row[other]),) in missing for other in row
                    ),
                )
        missing -= {pair(p, row[p], q, row[q]) for p, q in combinations(names, 2)}
        yield {name: values[name][choice] for name, choice in row.items()}


def pair(a: str, x: int, b: str, y: int) -> tuple[str, int, str, int]:
    return (a, x, b, y) if a < b else (b, y, a, x)
