"""``drivetrain plugins``: everything that is installed, and the hooks it takes part in."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import get_args

import click

from drivetrain.errors import PluginError
from drivetrain.plan.registry import Entry, Group, Registry
from drivetrain_cli.tables import show

GROUPS: tuple[Group, ...] = get_args(Group)


@dataclass
class Row:
    """What a distribution offers of one kind; plugins have a row each.

    Args:
        kind: the registry group.
        names: all names that it serves.
        distribution: who offers it.
        version: that distribution's version.
        hooks: hooks that it implements, for plugins.
        problem: why it cannot be loaded, where it cannot.
    """

    kind: str
    names: list[str]
    distribution: str
    version: str
    hooks: list[str]
    problem: str | None = None


@click.command()
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of a table.")
def plugins(as_json: bool) -> None:
    """List what is installed: plugins, accelerators, optimizers, schedulers, kernels, commands."""
    rows = installed(Registry.installed())
    if as_json:
        click.echo(json.dumps([asdict(row) for row in rows], indent=2))
        return
    from rich.markup import escape
    from rich.table import Table

    table = Table("kind", "serves", "distribution", "hooks")
    for row in rows:
        last = f"[red]{escape(row.problem)}[/]" if row.problem else ", ".join(row.hooks)
        owner = f"{row.distribution} {row.version}"
        table.add_row(row.kind, escape(", ".join(row.names)), owner, last)
    show(table)


def installed(registry: Registry) -> list[Row]:
    """One row per plugin, which is imported for it, and per distribution and kind of all else."""
    rows: dict[tuple[str, str, str], Row] = {}
    for kind in GROUPS:
        for entry in registry.entries(kind):
            key = (kind, entry.distribution, entry.value if kind == "plugins" else "")
            if key not in rows:
                rows[key] = Row(kind.removesuffix("s"), [], entry.distribution, entry.version, [])
                if kind == "plugins":
                    _look_inside(entry, rows[key])
            rows[key].names.append(entry.name)
    return list(rows.values())


def _look_inside(entry: Entry, row: Row) -> None:
    from drivetrain.plan.hub import HOOKS

    try:
        plugin = entry.load()
    except PluginError as error:
        row.problem = str(error)
    else:
        row.hooks = [hook for hook in HOOKS if hasattr(plugin, hook)]
