"""Timelines as text, as SVG, and as a trace for Chrome and Perfetto."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

from drivetrain_pipeline.schedules.timeline import Span, Timeline

COLOURS: Mapping[str, str] = {"F": "#7fb2e5", "B": "#8fcf94", "I": "#a8dcae", "W": "#f2c46d"}
"""Fill of each kind of instruction."""

_PASSES = {"F": "forward", "B": "backward", "I": "gradients of inputs", "W": "gradients of weights"}

_ROW, _GAP, _LEFT, _WIDTH = 28, 6, 64, 1100


def as_text(timeline: Timeline, width: int = 100) -> list[str]:
    """Draw a timeline in letters, one line a stage.

    A column is an equal part of the makespan. It shows the pass that fills most of it, and ``.``
    where the stage waits. The first column of a pass has its letter, F, B, I or W, and those after
    it the micro-batch's number as far as it fits, then ``-``.

    Args:
        timeline: to draw.
        width: columns.
    """
    scale = width / timeline.makespan if timeline.makespan else 0.0
    lines = []
    for stage, spans in enumerate(timeline.spans):
        row = ["."] * width
        for span in spans:
            first = round((span.begin - timeline.begin) * scale)
            last = round((span.end - timeline.begin) * scale)
            label = f"{span.instruction.kind}{span.instruction.micro_batch}"
            row[first:last] = label[: last - first].ljust(last - first, "-")
        lines.append(f"stage {stage:<3} {''.join(row)}  bubble {timeline.bubble(stage):6.1%}")
    return lines


def as_svg(timeline: Timeline, title: str) -> str:
    """Draw a timeline as an SVG picture, one row a stage.

    Later chunks of a stage are darker. Each pass has a title with its times.

    Args:
        timeline: to draw.
        title: of the picture.
    """
    height = 40 + len(timeline.spans) * (_ROW + _GAP) + 28
    chunks = 1 + max((s.instruction.chunk for row in timeline.spans for s in row), default=0)
    box = f"0 0 {_LEFT + _WIDTH + 90} {height}"
    font = 'font-family="sans-serif" font-size="12"'
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="{box}" {font}>',
        f"<title>{escape(title)}</title>",
        f'<text x="8" y="22" font-size="15">{escape(title)}</text>',
    ]
    for stage, spans in enumerate(timeline.spans):
        y = 40 + stage * (_ROW + _GAP)
        parts.append(f'<text x="8" y="{y + 19}">stage {stage}</text>')
        parts.append(f'<rect x="{_LEFT}" y="{y}" width="{_WIDTH}" height="{_ROW}" fill="#eeeeee"/>')
        parts += [_box(span, timeline, y, chunks) for span in spans]
        bubble = f"{timeline.bubble(stage):.1%} idle"
        parts.append(f'<text x="{_LEFT + _WIDTH + 8}" y="{y + 19}">{bubble}</text>')
    x, y = _LEFT, height - 14
    kinds = {span.instruction.kind for row in timeline.spans for span in row}
    for kind in (kind for kind in COLOURS if kind in kinds):
        parts.append(f'<rect x="{x}" y="{y - 10}" width="12" height="12" fill="{COLOURS[kind]}"/>')
        parts.append(f'<text x="{x + 18}" y="{y}">{_PASSES[kind]}</text>')
        x += 170
    return "\n".join([*parts, "</svg>", ""])


def _box(span: Span, timeline: Timeline, y: int, chunks: int) -> str:
    one = span.instruction
    scale = _WIDTH / timeline.makespan if timeline.makespan else 0.0
    x, width = _LEFT + (span.begin - timeline.begin) * scale, (span.end - span.begin) * scale
    shade = 1 - 0.45 * one.chunk / chunks
    times = f"{one}: {_PASSES[one.kind]}, {span.begin:g} to {span.end:g}"
    label = str(one.micro_batch)
    text = ""
    if width > 8 * len(label):
        text = f'<text x="{x + width / 2:.2f}" y="{y + 19}" text-anchor="middle">{label}</text>'
    return (
        f"<g><title>{escape(times)}</title>"
        f'<rect x="{x:.2f}" y="{y}" width="{width:.2f}" height="{_ROW}" fill="{COLOURS[one.kind]}" '
        f'fill-opacity="{shade:.2f}" stroke="#555555" stroke-width="0.6"/>{text}</g>'
    )


@dataclass(frozen=True)
class Drawing:
    """A timeline to look at: text where it is printed, a picture in notebooks and on pages.

    Args:
        timeline: to draw.
        title: of the picture.
        width: columns of the text.
    """

    timeline: Timeline
    title: str
    width: int = 100

    def __str__(self) -> str:
        return "\n".join(as_text(self.timeline, self.width))

    def _repr_svg_(self) -> str:
        return as_svg(self.timeline, self.title)


def as_chrome_trace(timelines: Mapping[str, Timeline], unit: float = 1.0) -> str:
    """Write timelines as a trace that chrome://tracing and ui.perfetto.dev open.

    Args:
        timelines: title, such as ``predicted``, -> timeline. Each begins at 0.
        unit: seconds of one unit of the timelines' time.
    """
    events: list[dict[str, object]] = []
    for process, (title, timeline) in enumerate(timelines.items()):
        events.append(_named("process_name", process, 0, title))
        for stage, spans in enumerate(timeline.spans):
            events.append(_named("thread_name", process, stage, f"stage {stage}"))
            events += _events(process, stage, spans, timeline.begin, unit * 1e6)
    return json.dumps({"traceEvents": events, "displayTimeUnit": "ms"})


def _named(what: str, process: int, thread: int, name: str) -> dict[str, object]:
    return {"name": what, "ph": "M", "pid": process, "tid": thread, "args": {"name": name}}


def _events(
    process: int, stage: int, spans: Sequence[Span], begin: float, microseconds: float
) -> list[dict[str, object]]:
    return [
        {
            "name": str(span.instruction),
            "cat": _PASSES[span.instruction.kind],
            "ph": "X",
            "ts": (span.begin - begin) * microseconds,
            "dur": (span.end - span.begin) * microseconds,
            "pid": process,
            "tid": stage,
            "args": {
                "micro_batch": span.instruction.micro_batch,
                "chunk": span.instruction.chunk,
            },
        }
        for span in spans
    ]
