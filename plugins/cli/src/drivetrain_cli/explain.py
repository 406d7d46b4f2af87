"""``drivetrain explain``: what a config activates, why, and in which order, as tables or a page."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from html import escape
from importlib import resources
from pathlib import Path
from string import Template
from typing import TYPE_CHECKING

import click

from drivetrain.cli import UserPath
from drivetrain.errors import DrivetrainError
from drivetrain.wording import as_json
from drivetrain_cli.config import OVERLAY_OPTION, WORLD_SIZE_OPTION
from drivetrain_cli.tables import show

if TYPE_CHECKING:
    from rich.table import Table

    from drivetrain.plan.plan import Explanation, Plan

Sections = Mapping[str, Sequence[tuple[str, object]]]
"""Heading -> rows (label, value) of what plugins explain of a plan."""

PHASES = {
    "plan": ("mesh_axes", "configure", "plan_batch"),
    "job": ("select_accelerator", "wrap_communicator"),
    "engine": (
        *("transform_module", "describe_parameters", "keep_parameters", "wrap_update_rule"),
        *(
            "build_model_states",
            "place_state",
            "watch_gradients",
            "receive_gradients",
            "build_gradient_norm",
            "wrap_attention",
            "build_runner",
            "build_loader",
        ),
        "build_inference",
    ),
    "forward": ("prepare_inputs",),
    "backward": ("backward",),
    "step": ("optimizer_step", "step_end"),
    "checkpoint": ("save_state", "state_fragments", "carry_out_save", "load_state"),
    "report": ("report_rows", "memory_rows"),
}
"""The way of a job: moment -> hooks that run in it, in order."""

WHEN = {
    "plan": "once, before any device",
    "job": "once, devices and communication",
    "engine": "once, module and states",
    "forward": "every micro-batch",
    "backward": "every micro-batch",
    "step": "every accumulation boundary",
    "checkpoint": "when saving and loading",
    "report": "outside a job",
}


@click.command()
@click.argument("file")
@OVERLAY_OPTION
@WORLD_SIZE_OPTION
@click.option("--html", type=UserPath(path_type=Path), help="Write a page with a picture here.")
@click.option("--json", "as_data", is_flag=True, help="Print all of it as JSON.")
def explain(
    file: str, overlays: tuple[str, ...], world_size: int | None, html: Path | None, as_data: bool
) -> None:
    """Show what the config FILE activates: plugins and why, settings, mesh, hooks in order.

    Active plugins add tables of their own, such as the timeline of a pipeline.
    """
    from drivetrain.plan.plan import Plan

    if html is not None and as_data:
        raise click.UsageError("--html and --json are two forms of one thing; give one of them")
    plan = Plan.build(file, overlays=overlays, world_size=world_size)
    explanation, sections = plan.explain(), sections_of(plan)
    if as_data:
        click.echo(_data(explanation, sections))
        return
    if html is None:
        show(*_tables(explanation), *_section_tables(sections))
        return
    try:
        html.write_text(page(explanation, file, sections), "utf-8")
    except OSError as error:
        raise DrivetrainError(f"{html} cannot be written: {error.strerror}") from error
    click.echo(f"wrote {html}")


def sections_of(plan: Plan) -> Sections:
    """Ask the distributions of the plan's active plugins for what they explain of it.

    An entry of ``drivetrain.explain`` is a function of the plan that returns rows (label, value).
    Of a value, tables and JSON show ``str(value)``; a page shows the picture that its method
    ``_repr_svg_`` returns, if it has one.
    """
    active = {member.entry.distribution for member in plan.members if member.active}
    entries = plan.registry.entries("explain")
    found = ((e.name, tuple(e.load()(plan))) for e in entries if e.distribution in active)
    return {heading: rows for heading, rows in found if rows}


def _data(explanation: Explanation, sections: Sections) -> str:
    data = {
        **asdict(explanation),
        "sections": {
            heading: [{"label": label, "value": str(value)} for label, value in rows]
            for heading, rows in sections.items()
        },
    }
    return json.dumps(data, indent=2, default=str)


def _section_tables(sections: Sections) -> Iterator[Table]:
    from rich.markup import escape as plain
    from rich.table import Table

    for heading, rows in sections.items():
        table = Table(title=heading, title_justify="left", show_header=False)
        for label, value in rows:
            table.add_row(plain(label), plain(str(value)))
        yield table


def _tables(explanation: Explanation) -> Iterator[Table]:
    from rich.markup import escape as plain
    from rich.table import Table

    plugins = Table("plugin", "why", "active", title="Plugins", title_justify="left")
    for label, (reason, active) in explanation.plugins.items():
        plugins.add_row(plain(label), plain(reason), "yes" if active else "switched off")
    settings = Table("setting", "is", "from", title="Settings", title_justify="left")
    values = Table("value", "is", "from", title="Values", title_justify="left")
    for table, rows in ((settings, explanation.settings), (values, explanation.values)):
        for name, (value, source) in rows.items():
            table.add_row(name, plain(_shown(value)), plain(source))
    mesh = Table("axis", "ranks", title="Mesh", title_justify="left")
    for name, size in explanation.mesh.items():
        mesh.add_row(name, str(size))
    hooks = Table("moment", "hook", "asked in this order", title="Hooks", title_justify="left")
    for moment, hook, labels in _hooks(explanation):
        hooks.add_row(moment, hook, plain("\n".join(labels)))
    yield from (plugins, settings, values, mesh, hooks)
    if explanation.notes:
        notes = Table("note", title="Notes", title_justify="left")
        for note in explanation.notes:
            notes.add_row(plain(note))
        yield notes


def _shown(value: object) -> str:
    return value if isinstance(value, str) else as_json(value)


def _hooks(explanation: Explanation) -> Iterator[tuple[str, str, list[str]]]:
    for moment, names in PHASES.items():
        for name in names:
            if name in explanation.hooks:
                yield moment, name, list(explanation.hooks[name])


def page(explanation: Explanation, title: str, sections: Sections) -> str:
    """A self-contained HTML page: the way of a job with its hooks, plugins, values and mesh.

    Args:
        explanation: of the plan.
        title: what it is about, such as the config's file.
        sections: what plugins add; see :func:`sections_of`.
    """
    numbers = {label: at for at, label in enumerate(explanation.plugins)}
    template = resources.files("drivetrain_cli").joinpath("explain.html").read_text("utf-8")
    return Template(template).substitute(
        title=escape(title),
        way="".join(_moment(moment, explanation, numbers) for moment in PHASES),
        plugins=_rows(
            (_chip(label, numbers), escape(reason), "yes" if active else "switched off")
            for label, (reason, active) in explanation.plugins.items()
        ),
        values=_rows(
            (escape(name), escape(_shown(value)), escape(source))
            for rows in (explanation.settings, explanation.values)
            for name, (value, source) in rows.items()
        ),
        mesh=_rows((escape(name), str(size)) for name, size in explanation.mesh.items()),
        sections="".join(
            f"<h2>{escape(heading)}</h2><table>"
            f"{_rows((escape(label), _drawn(value)) for label, value in rows)}</table>"
            for heading, rows in sections.items()
        ),
        notes="".join(f"<li>{escape(note)}</li>" for note in explanation.notes) or "<li>none</li>",
    )


def _drawn(value: object) -> str:
    draw = getattr(value, "_repr_svg_", None)  # as notebooks ask for pictures
    return f"<pre>{escape(str(value))}</pre>" if draw is None else str(draw())


def _moment(moment: str, explanation: Explanation, numbers: dict[str, int]) -> str:
    hooks = [(name, labels) for when, name, labels in _hooks(explanation) if when == moment]
    boxes = "".join(
        f"<div class='hook'><code>{name}</code>"
        f"<ol>{''.join(f'<li>{_chip(label, numbers)}</li>' for label in labels)}</ol></div>"
        for name, labels in hooks
    )
    empty = "<p class='none'>no hook taken</p>"
    return f"<section><h3>{moment}</h3><p>{WHEN[moment]}</p>{boxes or empty}</section>"


def _chip(label: str, numbers: dict[str, int]) -> str:
    hue = numbers.get(label, 0) * 137 % 360  # the golden angle keeps neighbours apart
    return f"<span class='chip' style='--hue:{hue}'>{escape(label)}</span>"


def _rows(rows: Iterator[tuple[str, ...]]) -> str:
    return "".join(f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows)
