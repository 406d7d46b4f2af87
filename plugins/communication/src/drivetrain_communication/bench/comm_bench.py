"""``drivetrain bench comm``: latency and bandwidth of every collective."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from drivetrain.cli import UserPath

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_communication.bench.measure import Row

_UNITS = {"k": 10, "m": 20, "g": 30}
COLLECTIVES = (
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "all_to_all",
    "broadcast",
    "send_receive",
)


class Size(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """Bytes, such as 4096, 64k or 16M."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).strip().lower().removesuffix("ib").removesuffix("b")
        shift = _UNITS.get(text[-1:], 0)
        number = text[:-1] if shift else text
        if not number.isdecimal() or not 0 < int(number) << shift <= 1 << 40:
            self.fail(f"{value!r} is no size such as 4096, 64k or 16M", param, ctx)
        return int(number) << shift


@click.command("comm")
@click.option(
    "--op",
    "kinds",
    multiple=True,
    type=click.Choice(COLLECTIVES),
    help="Which collective; may be repeated. All, if not given.",
)
@click.option(
    "--ranks",
    type=click.IntRange(min=2),
    help="Start so many ranks on this host. Without it, the ranks are those of the launcher that "
    "has started this command on each.",
)
@click.option("--axis", default="world", show_default=True, help="Mesh axis, as in the config.")
@click.option(
    "--config",
    type=UserPath(exists=True, dir_okay=False, path_type=Path),
    help="A config, for its mesh and its communication section.",
)
@click.option("--smallest", type=Size(), default="1k", show_default=True, help="Smallest size.")
@click.option("--largest", type=Size(), default="16M", show_default=True, help="Largest size.")
@click.option(
    "--dtype", type=click.Choice(["fp32", "bf16", "fp16"]), default="fp32", show_default=True
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=0.2,
    show_default=True,
    help="About how long to measure each collective of each size.",
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
@click.option(
    "--picture", type=UserPath(dir_okay=False, path_type=Path), help="Draw an SVG into this file."
)
def comm_bench(
    kinds: Sequence[str],
    ranks: int | None,
    axis: str,
    config: Path | None,
    smallest: int,
    largest: int,
    dtype: str,
    seconds: float,
    as_json: bool,
    picture: Path | None,
) -> None:
    """Measure collectives by size, beside the backend's own calls.

    Give --ranks, or start the command once per rank as training is started. Times are medians of
    the slowest rank. Each size is four times the one before.
    """
    if ranks is not None:
        raise SystemExit(started(ranks, "bench", "comm"))
    from drivetrain.job.job import Job
    from drivetrain.plan.plan import Plan
    from drivetrain_communication.bench.measure import DTYPES, sweep

    sizes = sizes_between(smallest, largest)
    plan = Plan.build({} if config is None else config, batch_required=False)
    with Job.open(plan) as job:
        if job.mesh.size(axis) == 1:
            raise click.ClickException(
                f"axis {axis!r} has one rank here: start several, as with drivetrain run -n 4"
            )
        rows = list(sweep(job, axis, kinds or COLLECTIVES, sizes, DTYPES[dtype], seconds))
        if job.rank == 0:
            _show(job, rows, axis, dtype, as_json=as_json, file=picture)


def sizes_between(smallest: int, largest: int) -> list[int]:
    """Sizes to measure, each four times the one before."""
    if largest < smallest:
        raise click.BadParameter("is below --smallest", param_hint="--largest")
    sizes = [smallest]
    while sizes[-1] * 4 <= largest:
        sizes.append(sizes[-1] * 4)
    return sizes


def started(ranks: int, *name: str) -> int:
    """Run a command with the options of this one on ``ranks`` processes; return its exit code.

    Args:
        ranks: how many.
        name: words of the command.
    """
    if "WORLD_SIZE" in os.environ:
        raise click.ClickException("a launcher has started this rank; leave out --ranks")
    context = click.get_current_context()
    words = []
    for option in context.command.params:
        value = context.params.get(option.name or "")
        values = value if isinstance(value, tuple) else (value,)
        if option.name != "ranks":
            found = (v for v in values if v not in (None, False))
            words += [
                w for v in found for w in ([option.opts[0]] + ([] if v is True else [str(v)]))
            ]
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command = [*launcher, "--nproc-per-node", str(ranks), "-m", "drivetrain.cli", *name]
    environment = {"OMP_NUM_THREADS": "1", **os.environ}
    return subprocess.run([*command, *words], env=environment, check=False).returncode


def _show(
    job: Job, rows: list[Row], axis: str, dtype: str, *, as_json: bool, file: Path | None
) -> None:
    from drivetrain_communication.bench.picture import picture, size_text

    title = f"{rows[0].ranks} ranks along {axis}, {dtype}, {job.accelerator.name}"
    if file is not None:
        file.write_text(picture(rows, f"Collectives of {title}"), "utf-8")
    if as_json:
        found = [
            {
                **asdict(row),
                "algorithm_bandwidth": row.algorithm_bandwidth,
                "bus_bandwidth": row.bus_bandwidth,
            }
            for row in rows
        ]
        click.echo(json.dumps({"axis": axis, "dtype": dtype, "rows": found}))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0)
    )
    for column in ("collective", "size"):
        table.add_column(column, no_wrap=True)
    for column in ("us", "GB/s", "bus GB/s", "backend us", "ratio"):
        table.add_column(column, justify="right", no_wrap=True)
    for row in rows:
        theirs = row.backend_seconds
        table.add_row(
            row.kind,
            size_text(row.nbytes),
            f"{row.seconds * 1e6:.1f}",
            f"{row.algorithm_bandwidth / 1e9:.3f}",
            f"{row.bus_bandwidth / 1e9:.3f}",
            "" if theirs is None else f"{theirs * 1e6:.1f}",
            "" if theirs is None else f"{theirs / row.seconds:.2f}",
        )
    Console().print(table)
