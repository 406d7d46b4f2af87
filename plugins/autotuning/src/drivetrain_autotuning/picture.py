"""A picture of what was tried."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape

_BAR, _LEFT, _WIDTH = 22, 330, 420


_UNITS = {
    "throughput": "samples a second",
    "latency": "steps a second",
    "flops": "operations a second of a rank",
}


def picture(
    trials: Sequence[tuple[str, float, str]],
    best: str,
    metric: str,
    keys: Mapping[str, str] | None = None,
) -> str:
    """Bars in the order of the trials, as an SVG.

    Args:
        trials: (name, score, error), score 0 and an error where it failed.
        best: name of the best one.
        metric: what scores are.
        keys: what the letters in names stand for, for the legend.
    """
    most = max((score for _, score, _ in trials), default=1.0) or 1.0
    rows = []
    for number, (name, score, error) in enumerate(trials):
        y = 40 + number * _BAR
        colour = "#2a9d4e" if name == best else "#d1432b" if error else "#6b8fb5"
        width = _WIDTH * score / most if score else 4
        note = escape(error[:60]) if error else f"{score:,.2f}"
        rows.append(
            f"<text x='{_LEFT - 8}' y='{y + 14}' text-anchor='end'>{escape(name)}</text>"
            f"<rect x='{_LEFT}' y='{y + 3}' width='{width:.1f}' height='{_BAR - 6}' "
            f"fill='{colour}'/><text x='{_LEFT + width + 6:.1f}' y='{y + 14}'>{note}</text>"
        )
    below = 40 + len(trials) * _BAR
    legend = [f"{letters}: {path}" for letters, path in (keys or {}).items()]
    legend += ["green: the best", "red: failed"]
    for number, line in enumerate(legend):
        y = below + 24 + 18 * number
        rows.append(f"<text x='{_LEFT}' y='{y}' fill='#555'>{escape(line)}</text>")
    height = below + 24 + 18 * len(legend)
    head = escape(f"{len(trials)} trials in their order, {_UNITS.get(metric, metric)}")
    return (
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 1000 {height}' "
        "font-family='system-ui, sans-serif' font-size='12'>"
        f"<rect width='1000' height='{height}' fill='#fff'/>"
        f"<text x='{_LEFT}' y='24' font-size='14'>{head}</text>"
        f"{''.join(rows)}</svg>\n"
    )
