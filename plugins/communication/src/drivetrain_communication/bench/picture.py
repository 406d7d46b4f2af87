"""The picture of a measurement: bus bandwidth by size, as SVG, without any library."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING
from xml.sax.saxutils import escape

if TYPE_CHECKING:
    from drivetrain_communication.bench.measure import Row

_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 720, 400, 70, 44, 170, 50
_COLOURS = ("#1f77b4", "#d62728", "#2ca02c", "#9467bd", "#ff7f0e", "#17becf")


def picture(rows: Sequence[Row], title: str) -> str:
    """An SVG of ``rows``: a line for each collective, dashed for the backend's own call."""
    sizes = [row.nbytes for row in rows]
    own = {(row.kind, row.nbytes): row.bus_bandwidth for row in rows}
    theirs = {
        (row.kind, row.nbytes): row.bus_bandwidth * row.seconds / row.backend_seconds
        for row in rows
        if row.backend_seconds
    }
    values = [*own.values(), *theirs.values()]
    x = _Scale(min(sizes), max(sizes), _LEFT, _WIDTH - _RIGHT, 2)
    y = _Scale(min(values), max(values), _HEIGHT - _BOTTOM, _TOP, 10)
    parts = [
        (
            f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" '
            'font-family="sans-serif" font-size="12">'
        ),
        f"<title>{escape(title)}</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" fill="white"/>',
        f'<text x="{_LEFT}" y="22" font-size="15">{escape(title)}</text>',
        *_grid(x, y),
    ]
    for number, kind in enumerate(dict.fromkeys(row.kind for row in rows)):
        colour = _COLOURS[number % len(_COLOURS)]
        parts += [_line(own, kind, x, y, colour, ""), _line(theirs, kind, x, y, colour, "5 4")]
        at = _TOP + 20 * number
        parts.append(f'<text x="{_WIDTH - _RIGHT + 16}" y="{at + 4}" fill="{colour}">{kind}</text>')
    note = _HEIGHT - _BOTTOM
    parts.append(f'<text x="{_WIDTH - _RIGHT + 16}" y="{note}">dashed: backend alone</text>')
    return "\n".join([*parts, "</svg>", ""])


class _Scale:
    """A logarithmic axis from ``low`` to ``high``, at pixels ``start`` to ``stop``."""

    def __init__(self, low: float, high: float, start: float, stop: float, base: int) -> None:
        self.base = base
        self.low, self.high = math.log(low, base), math.log(high, base)
        if self.high - self.low < 1e-9:
            self.low, self.high = self.low - 1, self.high + 1
        self.start, self.stop = start, stop

    def at(self, value: float) -> float:
        """Where ``value`` is."""
        share = (math.log(value, self.base) - self.low) / (self.high - self.low)
        return self.start + share * (self.stop - self.start)

    def ticks(self) -> list[float]:
        """Up to seven round values."""
        first, last = math.ceil(self.low - 1e-9), math.floor(self.high + 1e-9)
        step = max(1, -(-(last - first) // 6))
        return [float(self.base) ** power for power in range(first, last + 1, step)]


def _grid(x: _Scale, y: _Scale) -> list[str]:
    left, right, top, bottom = _LEFT, _WIDTH - _RIGHT, _TOP, _HEIGHT - _BOTTOM
    found = []
    for tick in x.ticks():
        at = f"{x.at(tick):.1f}"
        found.append(f'<path d="M{at} {top}V{bottom}" stroke="#ddd"/>')
        label = size_text(int(tick))
        found.append(f'<text x="{at}" y="{bottom + 18}" text-anchor="middle">{label}</text>')
    for tick in y.ticks():
        at = f"{y.at(tick):.1f}"
        found.append(f'<path d="M{left} {at}H{right}" stroke="#ddd"/>')
        label = f"{tick / 1e9:g}"
        found.append(f'<text x="{left - 8}" y="{at}" text-anchor="end">{label}</text>')
    found.append(f'<text x="{left}" y="{bottom + 40}">size of the tensor</text>')
    middle = (top + bottom) / 2
    found.append(
        f'<text transform="translate(18 {middle}) rotate(-90)" text-anchor="middle">'
        "bus bandwidth, GB/s</text>"
    )
    return found


def _line(
    values: dict[tuple[str, int], float], kind: str, x: _Scale, y: _Scale, colour: str, dash: str
) -> str:
    points = " ".join(
        f"{x.at(size):.1f},{y.at(value):.1f}"
        for (name, size), value in values.items()
        if name == kind
    )
    style = f' stroke-dasharray="{dash}"' if dash else ""
    return f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"{style}/>'


def size_text(nbytes: int) -> str:
    """``64 KiB``."""
    for unit, shift in (("GiB", 30), ("MiB", 20), ("KiB", 10)):
        if nbytes >= 1 << shift:
            return f"{nbytes / (1 << shift):.3g} {unit}"
    return f"{nbytes} B"
