"""A run's ledger as a page that needs nothing else: shares, a timeline of each rank, stragglers."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from html import escape
from importlib import resources
from string import Template
from typing import Any

from drivetrain_profiler.ledger.reading import Attempt, RankLedger, Step
from drivetrain_profiler.ledger.summary import Summary, in_order
from drivetrain_profiler.ledger.text import table
from drivetrain_profiler.ledger.timeline import PLAIN

_PIECES = 400
"""Bars per rank and attempt; of a longer run, each shows several steps together."""

_SHOWN_RANKS = 64

_HUES = {
    "compute": "#4c9a5b",
    "offload": "#b07aa1",
    "data": "#e8a33d",
    "checkpoint": "#9c755f",
    "compile": "#d4c84a",
    "start": "#8d99ae",
    "restart": "#5f6b80",
    "done again": "#c2385a",
    "idle": "#c9ced6",
}
_EXCHANGES = ("#3f7fbf", "#2a5d94", "#6fa8dc", "#20a4a4", "#7b8cd9", "#135e6b")


def page(attempts: Sequence[Attempt], found: Summary, name: str) -> str:
    """The page.

    Args:
        attempts: of the run.
        found: their sum.
        name: of the run.
    """
    colours = _colours(attempts, found)
    template = resources.files(__package__).joinpath("page.html").read_text("utf-8")
    return Template(template).substitute(
        title=escape(f"Ledger of {name}"),
        goodput=f"{found.goodput:.1%}",
        wall=f"{found.wall:.2f}",
        shares="".join(_shares(found, colours)),
        legend="".join(
            f'<span><i style="background:{colour}"></i>{escape(column)}</span>'
            for column, colour in colours.items()
        ),
        table=escape(table(found)),
        colours=_data(colours),
        rows=_data(_rows(attempts)),
        details=_data(_details(attempts)),
    )


def _data(value: Any) -> str:
    """JSON inside of a script element."""
    return json.dumps(value, separators=(",", ":")).replace("<", "\\u003c")


def _colours(attempts: Sequence[Attempt], found: Summary) -> dict[str, str]:
    columns = set(found.columns) | set(PLAIN)
    for attempt in attempts:
        for ledger in attempt.ranks.values():
            columns.update(column for step in ledger.steps for column in step.seconds)
    exchanges = [column for column in in_order(columns) if column not in _HUES]
    extra = {c: _EXCHANGES[i % len(_EXCHANGES)] for i, c in enumerate(exchanges)}
    return {column: {**_HUES, **extra}[column] for column in in_order(columns)}


def _shares(found: Summary, colours: Mapping[str, str]) -> Iterator[str]:
    for column, seconds in found.columns.items():
        share = 100 * seconds / found.wall if found.wall else 0.0
        title = escape(f"{column}: {seconds:.3f} s, {share:.1f} %")
        yield f'<b style="flex:{share:.4f};background:{colours[column]}" title="{title}"></b>'


def _rows(attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    """The bars of each rank: begin and length in seconds, seconds by column, and a name."""
    origin = attempts[0].started if attempts else 0.0
    rows: dict[int, list[Any]] = defaultdict(list)
    for number, attempt in enumerate(attempts, 1):
        shown = list(attempt.ranks.values())[:_SHOWN_RANKS]
        for ledger in shown:
            early = ledger.opened - ledger.started
            first = [ledger.started - origin, early, {"start": early}, f"attempt {number}: start"]
            rows[ledger.rank] += [first, *_bars(ledger, origin)]
    return [{"rank": rank, "bars": bars} for rank, bars in sorted(rows.items())]


def _bars(ledger: RankLedger, origin: float) -> Iterator[list[Any]]:
    together = -(-len(ledger.steps) // _PIECES) or 1
    for index in range(0, len(ledger.steps), together):
        steps = ledger.steps[index : index + together]
        seconds: dict[str, float] = defaultdict(float)
        for step in steps:
            for column, spent in step.seconds.items():
                seconds[column] += spent
        begin = ledger.opened - origin + steps[0].begin
        wall = sum(step.wall for step in steps)
        yield [round(begin, 4), round(wall, 4), _rounded(seconds), _named(steps)]


def _rounded(seconds: Mapping[str, float]) -> dict[str, float]:
    return {column: round(seconds[column], 5) for column in in_order(seconds)}


def _named(steps: Sequence[Step]) -> str:
    numbers = [step.number for step in steps if step.number is not None]
    if not numbers:
        return "after the last step"
    return f"step {numbers[0]}" if len(numbers) == 1 else f"steps {numbers[0]} to {numbers[-1]}"


def _details(attempts: Sequence[Attempt]) -> list[dict[str, Any]]:
    """The steps that were kept span by span, for all ranks together."""
    found: dict[tuple[int, int, int], dict[int, list[Any]]] = defaultdict(dict)
    for number, attempt in enumerate(attempts, 1):
        for ledger in list(attempt.ranks.values())[:_SHOWN_RANKS]:
            for step in ledger.steps:
                if step.spans is not None and step.number is not None:
                    # All ranks from one moment on: where the first of them began this step.
                    start = ledger.opened - attempt.started
                    spans = [
                        [s.column, s.name, round(start + s.begin, 6), round(s.seconds, 6)]
                        for s in step.spans
                    ]
                    found[number, step.engine, step.number][ledger.rank] = spans
    return [
        {"name": f"attempt {attempt}, step {step}", "ranks": sorted(ranks.items())}
        for (attempt, _, step), ranks in sorted(found.items())
    ]
