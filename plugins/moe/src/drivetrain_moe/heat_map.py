"""A picture of the load of experts over time, as SVG, without any library."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

from drivetrain.errors import DrivetrainError

_LEFT, _WIDTH, _RIGHT = 90, 800, 150
_ROW, _MOST_HEIGHT, _GAP, _TOP = 14, 420, 68, 58
_CELLS = 20_000
_SCALE = ((255, 255, 255), (254, 224, 144), (253, 141, 60), (189, 0, 38), (64, 0, 20))
"""Colours at the loads of ``_STOPS``, in even shares; between them they are mixed."""
_STOPS = (0.0, 1.0, 2.0, 4.0, 8.0)


@dataclass(frozen=True)
class LayerHistory:
    """The load of one layer's experts.

    Args:
        name: of the layer.
        steps: numbers of the steps, ascending.
        shares: by step, the share of choices of each expert, [steps][E].
    """

    name: str
    steps: Sequence[int]
    shares: Sequence[Sequence[float]]

    @property
    def experts(self) -> int:
        """How many experts there are."""
        return len(self.shares[0])

    def mean(self) -> list[float]:
        """The mean share of each expert over all steps, [E]."""
        return _mean(self.shares)


def read_history(file: Path, layer: str | None = None) -> list[LayerHistory]:
    """Read what ``moe.load.file`` has become.

    Of a step that comes twice, as after a resumed run, the last line counts. A last line without
    an end is left out: its writer was killed.

    Args:
        file: lines of JSON.
        layer: regular expression; layers whose names have no match are left out.

    Raises:
        DrivetrainError: the file cannot be read, is something else, has no such layer, or a layer
            has other numbers of experts at other steps.
    """
    found: dict[str, dict[int, list[float]]] = {}
    for number, line in enumerate(_lines(file), 1):
        step, load = _parsed(line, f"{file}, line {number}")
        for name, shares in load.items():
            found.setdefault(name, {})[step] = shares
    if not found:
        raise DrivetrainError(
            f"{file} has no load of experts: no line has the key 'load'; expected the file that "
            "the config's moe.load.file names, in a run with experts"
        )
    names = list(found)
    if layer is not None:
        try:
            names = [name for name in names if re.search(layer, name)]
        except re.error as error:
            raise DrivetrainError(
                f"--layer: {layer!r} is no regular expression: {error}"
            ) from error
        if not names:
            raise DrivetrainError(f"--layer: {layer!r} matches none of {', '.join(found)}")
    for name in names:
        counts = {len(shares) for shares in found[name].values()}
        if len(counts) > 1:
            raise DrivetrainError(
                f"{file}: {name} has {' and '.join(map(str, sorted(counts)))} experts at different "
                "steps: two runs have written to one file"
            )
    return [
        LayerHistory(name, sorted(found[name]), [found[name][s] for s in sorted(found[name])])
        for name in names
    ]


def summary(history: Sequence[LayerHistory]) -> str:
    """Return a line for each layer: steps, experts, and the busiest and the idlest one."""
    lines = []
    for layer in history:
        mean = layer.mean()
        most, least = max(mean), min(mean)
        lines.append(
            f"{layer.name}: steps {layer.steps[0]} to {layer.steps[-1]}, {layer.experts} experts; "
            f"most: expert {mean.index(most)} with {most:.1%} of choices, least: expert "
            f"{mean.index(least)} with {least:.1%}, even: {1 / layer.experts:.1%}\n"
        )
    return "".join(lines)


def heat_map(history: Sequence[LayerHistory], title: str, columns: int | None = None) -> str:
    """Draw a panel for each layer: steps to the right, experts downwards.

    A colour is the share of choices of an expert, in even shares (1 / E), so that layers with
    different numbers of experts compare. Each cell tells its numbers under the pointer.

    Args:
        history: of at least one layer.
        title: what run it is.
        columns: cells of a row at most; steps are put together evenly where there are more. By
            default 200, or fewer (20 at least) so that the picture has 20,000 cells at most.
    """
    if columns is None:
        columns = max(20, min(200, _CELLS // sum(layer.experts for layer in history)))
    parts: list[str] = []
    y = _TOP
    for layer in history:
        height = min(_MOST_HEIGHT, max(_ROW * layer.experts, 28))
        parts += _panel(layer, y, height, columns)
        y += height + _GAP
    whole = max(y, _TOP + 200)
    head = f"Load of experts over time: {title}"
    return "\n".join(
        [
            (
                f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 '
                f'{_LEFT + _WIDTH + _RIGHT} {whole}" font-family="sans-serif" font-size="12">'
            ),
            f"<title>{escape(head)}</title>",
            '<rect width="100%" height="100%" fill="white"/>',
            f'<text x="{_LEFT}" y="24" font-size="16">{escape(head)}</text>',
            *_legend(),
            *parts,
            "</svg>",
            "",
        ]
    )


def colour_of(even_shares: float) -> str:
    """The colour of a load, in even shares; those above 8 look like 8."""
    value = min(max(even_shares, 0.0), _STOPS[-1])
    place = max(i for i, stop in enumerate(_STOPS[:-1]) if value >= stop)
    low, high = _STOPS[place], _STOPS[place + 1]
    share = (value - low) / (high - low)
    pairs = zip(_SCALE[place], _SCALE[place + 1], strict=True)
    return "#" + "".join(f"{round(a + share * (b - a)):02x}" for a, b in pairs)


def _panel(layer: LayerHistory, top: float, height: float, columns: int) -> list[str]:
    bins = _bins(len(layer.steps), columns)
    wide, high = _WIDTH / len(bins), height / layer.experts
    head = f"{layer.name} ({layer.experts} experts, even share {1 / layer.experts:.1%})"
    parts = [f'<text x="{_LEFT}" y="{top - 6}" font-weight="bold">{escape(head)}</text>']
    for column, (begin, end) in enumerate(bins):
        first, last = layer.steps[begin], layer.steps[end - 1]
        when = f"step {first}" if first == last else f"steps {first} to {last}"
        for expert, share in enumerate(_mean(layer.shares[begin:end])):
            even = share * layer.experts
            parts.append(
                f'<rect x="{_LEFT + column * wide:.2f}" y="{top + expert * high:.2f}" '
                f'width="{wide:.2f}" height="{high:.2f}" fill="{colour_of(even)}">'
                f"<title>{when}, expert {expert}: {share:.1%} of choices, {even:.2f} even "
                "shares</title></rect>"
            )
    parts.append(
        f'<rect x="{_LEFT}" y="{top}" width="{_WIDTH}" height="{height:.2f}" fill="none" '
        'stroke="#888"/>'
    )
    return parts + _axes(layer, bins, top, height)


def _axes(
    layer: LayerHistory, bins: Sequence[tuple[int, int]], top: float, height: float
) -> list[str]:
    high, parts = height / layer.experts, []
    every = max(1, math.ceil(12 / high))
    for expert in range(0, layer.experts, every):
        at = top + (expert + 0.5) * high + 4
        parts.append(f'<text x="{_LEFT - 6}" y="{at:.1f}" text-anchor="end">{expert}</text>')
    middle = top + height / 2
    parts.append(
        f'<text transform="translate(56 {middle:.1f}) rotate(-90)" text-anchor="middle">'
        "expert</text>"
    )
    wide = _WIDTH / len(bins)
    for column in sorted({round(i * (len(bins) - 1) / 8) for i in range(9)}):
        at = _LEFT + (column + 0.5) * wide
        step = layer.steps[bins[column][0]]
        parts.append(
            f'<text x="{at:.1f}" y="{top + height + 15:.1f}" text-anchor="middle">{step}</text>'
        )
    parts.append(
        f'<text x="{_LEFT + _WIDTH / 2:.0f}" y="{top + height + 31:.1f}" text-anchor="middle">'
        "optimizer step</text>"
    )
    return parts


def _legend() -> list[str]:
    x, cell = _LEFT + _WIDTH + 16, 18
    parts = [
        f'<text x="{x}" y="{_TOP + 6}">share of choices,</text>',
        f'<text x="{x}" y="{_TOP + 21}">in even shares</text>',
    ]
    for number, value in enumerate((0.0, 0.5, 1.0, 1.5, 2.0, 4.0, 8.0)):
        at = _TOP + 32 + number * cell
        label = f"{value:g}" + (" (even)" if value == 1 else " or more" if value == 8 else "")
        parts.append(
            f'<rect x="{x}" y="{at}" width="22" height="{cell}" fill="{colour_of(value)}" '
            'stroke="#ccc"/>'
        )
        parts.append(f'<text x="{x + 30}" y="{at + 13}">{label}</text>')
    return parts


def _bins(steps: int, columns: int) -> list[tuple[int, int]]:
    """(first, one beyond the last) of the steps of each column; sizes differ by at most one."""
    count = min(steps, columns)
    return [(i * steps // count, (i + 1) * steps // count) for i in range(count)]


def _mean(rows: Sequence[Sequence[float]]) -> list[float]:
    return [sum(column) / len(rows) for column in zip(*rows, strict=True)]


def _lines(file: Path) -> list[str]:
    try:
        text = file.read_text("utf-8")
    except OSError as error:
        raise DrivetrainError(f"{file} cannot be read: {error.strerror}") from error
    except UnicodeDecodeError as error:
        raise DrivetrainError(f"{file} is not text: expected lines of JSON") from error
    return text.split("\n")[:-1]


def _parsed(line: str, where: str) -> tuple[int, Mapping[str, list[float]]]:
    """The step and the load of a line; no load where it has other things."""
    try:
        row: Any = json.loads(line)
    except ValueError as error:
        raise DrivetrainError(f"{where} is not JSON: expected lines of JSON") from error
    if not isinstance(row, dict) or "load" not in row:
        return 0, {}
    step: Any = row.get("step")
    load: Any = row["load"]
    right = (
        isinstance(step, int)
        and isinstance(load, dict)
        and all(isinstance(shares, list) and shares for shares in load.values())
        and all(isinstance(s, int | float) for shares in load.values() for s in shares)
    )
    if not right:
        raise DrivetrainError(
            f'{where}: expected {{"step": 1, "load": {{LAYER: [share of each expert]}}}}, got '
            f"{line[:80]}"
        )
    return step, load
