"""The page of ``drivetrain plan --html``: self-contained, with a picture of memory over a step."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from html import escape
from importlib import resources
from string import Template
from typing import TYPE_CHECKING

from drivetrain_cli.planning.plan_tables import (
    PHASES,
    advice,
    amount,
    duration,
    headline,
    kinds_of,
    time_rows,
    traffic,
)
from drivetrain_cli.planning.rehearsed import FIRST

if TYPE_CHECKING:
    from drivetrain_cli.planning.rehearsed import Moment
    from drivetrain_cli.planning.verdict import Verdict

_WIDTH, _HEIGHT, _LEFT, _TOP = 960, 320, 70, 16
_NAMES = {"step": "update"}
"""What phases are called in the picture, whose steps are those of training."""


def page(verdict: Verdict, title: str) -> str:
    """The page.

    Args:
        verdict: what it shows.
        title: what it is about, such as the config's file.
    """
    found, price = verdict.heaviest, verdict.price
    template = resources.files("drivetrain_cli.planning").joinpath("plan.html")
    explained = found.explained
    values = {**explained.settings, **explained.values}
    peaks = [found.peaks[phase] for phase in PHASES if phase in found.peaks]
    return Template(template.read_text("utf-8")).substitute(
        title=escape(title),
        state="fits" if verdict.fits else "short",
        headline=escape(headline(verdict)),
        about=escape(
            f"{found.parameters:,} parameters, {verdict.question.world} ranks, "
            f"{found.micro_batch} x {found.accumulation} samples of "
            f"{verdict.question.subject.sequence} tokens a rank and step"
        ),
        advice="".join(f"<li>{escape(line)}</li>" for line in advice(verdict)),
        timeline=timeline(found.timeline, verdict.question.memory),
        phases="".join(f"<th>{moment.phase}</th>" for moment in peaks),
        memory=_memory(peaks),
        time="<p>no table of a machine: run <code>drivetrain measure</code></p>"
        if price is None
        else _table(
            (label, duration(s)) for label, s in [*time_rows(price), ("a step", price.seconds)]
        ),
        traffic=_table(
            (
                (axis, purpose, op, f"{calls:,}", amount(sent))
                for (axis, purpose, op), (_, calls, _, sent) in traffic(found).items()
            ),
            *("axis", "purpose", "collective", "calls", "sent by a rank"),
        ),
        values=_table(
            ((name, str(value), source) for name, (value, source) in values.items()),
            *("value", "is", "from"),
        ),
        notes="".join(f"<li>{escape(note)}</li>" for note in verdict.notes) or "<li>none</li>",
    )


def _table(rows: Iterable[tuple[str, ...]], *names: str) -> str:
    cells = ("".join(f"<td>{escape(cell)}</td>" for cell in row) for row in rows)
    head = "".join(f"<th>{name}</th>" for name in names)
    return f"<table><tr>{head}</tr>{''.join(f'<tr>{row}</tr>' for row in cells)}</table>"


def _memory(peaks: list[Moment]) -> str:
    rows = []
    for number, (kind, place) in enumerate(kinds_of(peaks)):
        held = (moment.held.get((kind, place), 0) for moment in peaks)
        cells = "".join(f"<td class='n'>{amount(n) if n else '-'}</td>" for n in held)
        swatch = f"<i style='background:{_colour(number)}'></i>" if place == "device" else ""
        rows.append(f"<tr><td>{swatch}{escape(kind)}</td><td>{place}</td>{cells}</tr>")
    for place in ("device", "host", "nvme"):
        if any(moment.total(place) for moment in peaks):
            totals = "".join(f"<td class='n'>{amount(m.total(place))}</td>" for m in peaks)
            rows.append(f"<tr class='total'><td>total</td><td>{place}</td>{totals}</tr>")
    return "".join(rows)


def _colour(number: int) -> str:
    return f"hsl({number * 137 % 360} 55% 55%)"  # the golden angle keeps neighbours apart


def timeline(moments: list[Moment], memory: int | None) -> str:
    """Memory of the device over the rehearsed steps, as an SVG of stacked areas.

    Args:
        moments: in order.
        memory: bytes of the device, drawn as a line where that is near.
    """
    peaks = [moment for moment in moments if moment.held]
    kinds = kinds_of(peaks)
    most = max((m.total("device") for m in moments), default=1) or 1
    top = memory if memory is not None and memory < 2 * most else most
    grid = _grid(max(top, most))
    top = grid[-1]
    first, last = moments[0].at, max(moments[-1].at, moments[0].at + 1)

    def x(at: int) -> float:
        return _LEFT + (at - first) * (_WIDTH - _LEFT) / (last - first)

    def y(nbytes: int) -> float:
        return _TOP + _HEIGHT * (1 - nbytes / top)

    parts = [_axis(grid), *_bands(moments, x), *_steps(moments, x)]
    below = [0] * len(moments)
    for number, kind in enumerate(kinds):
        if kind[1] != "device":
            continue
        above = [b + m.held.get(kind, 0) for b, m in zip(below, moments, strict=True)]
        if above != below:
            edge = [f"{x(m.at):.1f},{y(n):.1f}" for m, n in zip(moments, above, strict=True)]
            back = [f"{x(m.at):.1f},{y(n):.1f}" for m, n in zip(moments, below, strict=True)]
            peak = max(m.held.get(kind, 0) for m in moments)
            parts.append(
                f"<polygon points='{' '.join(edge + back[::-1])}' fill='{_colour(number)}'>"
                f"<title>{escape(kind[0])}: {amount(peak)} at most</title></polygon>"
            )
        below = above
    if memory is not None and memory <= top:
        parts.append(
            f"<line x1='{_LEFT}' x2='{_WIDTH}' y1='{y(memory):.1f}' y2='{y(memory):.1f}' "
            f"class='limit'/><text x='{_WIDTH}' y='{y(memory) - 4:.1f}' text-anchor='end'>"
            f"{amount(memory)}</text>"
        )
    size = f"0 0 {_WIDTH + 24} {_HEIGHT + _TOP + 46}"
    return f"<svg viewBox='{size}' role='img' aria-label='memory over time'>{''.join(parts)}</svg>"


def _grid(most: int) -> list[int]:
    """Round sizes from 0 to at least ``most``, which are named by one unit."""
    step = 1
    while most > 6 * step:
        step *= 2
    return [step * number for number in range(-(-most // step) + 1)]


def _axis(grid: list[int]) -> str:
    marks = []
    for nbytes in grid:
        height = _TOP + _HEIGHT * (1 - nbytes / grid[-1])
        marks.append(
            f"<line x1='{_LEFT}' x2='{_WIDTH}' y1='{height:.1f}' y2='{height:.1f}' class='grid'/>"
            f"<text x='{_LEFT - 6}' y='{height + 4:.1f}' text-anchor='end'>{_round(nbytes)}</text>"
        )
    return "".join(marks)


def _round(nbytes: int) -> str:
    number, _, unit = amount(nbytes).partition(" ")
    return f"{float(number.replace(',', '')):g} {unit}"


def _steps(moments: list[Moment], x: Callable[[int], float]) -> Iterable[str]:
    """A line where the second step begins, and the names of both."""
    second = next((m.at for m in moments if m.window > FIRST), None)
    first = next((m.at for m in moments if m.window), None)
    for name, at in (("first step", first), ("second step", second)):
        if at is not None:
            yield (
                f"<line x1='{x(at):.1f}' x2='{x(at):.1f}' y1='0' y2='{_TOP + _HEIGHT}' "
                f"class='step'/><text x='{x(at) + 4:.1f}' y='10'>{name}</text>"
            )


def _bands(moments: list[Moment], x: Callable[[int], float]) -> Iterable[str]:
    """A label under each stretch of one phase, in two rows, since some stretches are short."""
    begin = 0
    for at in range(1, len(moments) + 1):
        ends = at == len(moments)
        if ends or (moments[at].phase, moments[at].window) != (
            moments[begin].phase,
            moments[begin].window,
        ):
            left, right = x(moments[begin].at), x(moments[min(at, len(moments) - 1)].at)
            shade = PHASES.index(moments[begin].phase) % 2
            yield (
                f"<rect x='{left:.1f}' y='{_TOP}' width='{max(0, right - left):.1f}' "
                f"height='{_HEIGHT}' class='band{shade}'/>"
            )
            if right - left > 6:
                middle, height = (left + right) / 2, _TOP + _HEIGHT + (32 if shade else 16)
                yield (
                    f"<text x='{middle:.1f}' y='{height}' text-anchor='middle'>"
                    f"{_NAMES.get(moments[begin].phase, moments[begin].phase)}</text>"
                )
            begin = at
