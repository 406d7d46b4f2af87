"""``drivetrain comm``: which way collectives are fastest here."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from drivetrain.cli import UserPath
from drivetrain_communication.bench.comm_bench import COLLECTIVES, Size, sizes_between, started
from drivetrain_communication.routes.section import PATH, RouteName

if TYPE_CHECKING:
    from drivetrain_communication.routes.table import Table


@click.group()
def comm() -> None:
    """Find out how ranks communicate best (section communication)."""


@comm.command()
@click.option(
    "--out",
    type=UserPath(dir_okay=False, path_type=Path),
    default="routes.json",
    show_default=True,
    help="The table, for communication.routes.table.",
)
@click.option(
    "--ranks",
    type=click.IntRange(min=2),
    help="Start so many ranks on this host. Without it, the ranks are those of the launcher that "
    "has started this command on each.",
)
@click.option("--axis", "axes", multiple=True, help="Mesh axis; may be repeated. Default: world.")
@click.option(
    "--config",
    type=UserPath(exists=True, dir_okay=False, path_type=Path),
    help="A config, for its mesh and its communication section.",
)
@click.option(
    "--op",
    "kinds",
    multiple=True,
    type=click.Choice(COLLECTIVES),
    help="Which collective; may be repeated. All, if not given.",
)
@click.option(
    "--route",
    "routes",
    multiple=True,
    type=click.Choice(get_args(RouteName)),
    help="Try this route; may be repeated. Default: all that exist here.",
)
@click.option("--smallest", type=Size(), default="1k", show_default=True, help="Smallest size.")
@click.option("--largest", type=Size(), default="16M", show_default=True, help="Largest size.")
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=0.2,
    show_default=True,
    help="About how long to measure each collective of each size and route.",
)
def tune(
    out: Path,
    ranks: int | None,
    axes: Sequence[str],
    config: Path | None,
    kinds: Sequence[str],
    routes: Sequence[str],
    smallest: int,
    largest: int,
    seconds: float,
) -> None:
    """Measure each route of each collective by size, and write a table of the fastest.

    Give --ranks, or start the command once per rank as training is started. The table holds for
    the cluster that it was measured on; another one refuses it.
    """
    if ranks is not None:
        raise SystemExit(started(ranks, "comm", "tune"))
    from drivetrain.job.job import Job
    from drivetrain.plan.plan import Plan
    from drivetrain_communication.routes.plugin import routers
    from drivetrain_communication.routes.tune import tune as measure

    sizes = sizes_between(smallest, largest)
    plan = Plan.build(
        {} if config is None else config,
        overlays=[f"{PATH}.hierarchical=true", f"{PATH}.table=null"],
        batch_required=False,
    )
    with Job.open(plan) as job:
        if job.world_size == 1:
            raise click.ClickException("one rank has nobody to talk to: start several, or --ranks")
        table = measure(
            job, routers[job], axes or ("world",), kinds or COLLECTIVES, sizes, seconds, routes
        )
        if job.rank == 0:
            out.write_text(table.dumps(), "utf-8")
            _show(table)
            click.echo(
                f'wrote {out}; use it with "communication": {{"routes": {{"table": "{out}"}}}}'
            )


def _show(table: Table) -> None:
    from drivetrain_communication.bench.picture import size_text

    for (kind, shape), rows in table.best.items():
        ways = ", ".join(
            f"{route} from {size_text(size)}" if size else route for size, route in rows
        )
        click.echo(f"{kind} over {shape}: {ways}")
