"""``drivetrain bench io``: what a disk can do, and the ``aio`` section that makes it do so."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import asdict
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

if TYPE_CHECKING:
    from drivetrain_offload.bench.io_measure import Measurement, Row

ENGINES = ("auto", "io_uring", "libaio", "threads")


@click.command("io")
@click.argument("path", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option(
    "--size", default=1024, show_default=True, help="MiB of the file.", type=click.IntRange(min=16)
)
@click.option(
    "--seconds",
    default=0.5,
    show_default=True,
    help="Time for each direction of each setting.",
    type=click.FloatRange(min=0, min_open=True),
)
@click.option(
    "--block-size",
    multiple=True,
    default=(256, 1024, 4096),
    show_default=True,
    help="KiB of one request to the system, a multiple of 4; may be repeated.",
    type=click.IntRange(min=4),
)
@click.option(
    "--queue-depth",
    multiple=True,
    default=(4, 8, 32),
    show_default=True,
    help="Blocks under way per thread; may be repeated.",
    type=click.IntRange(min=1),
)
@click.option(
    "--threads",
    multiple=True,
    default=(1, 2),
    show_default=True,
    help="Threads that share a read or write; may be repeated.",
    type=click.IntRange(min=1),
)
@click.option(
    "--engine",
    multiple=True,
    default=("auto",),
    show_default=True,
    help="The system's interface; may be repeated.",
    type=click.Choice(ENGINES),
)
@click.option("--json", "as_json", is_flag=True, help="Print everything as JSON.")
def io_bench(path: Path, size: int, seconds: float, as_json: bool, **grid: Any) -> None:
    """Measure reads and writes of a file in the folder PATH, and print the best aio section.

    Throughput, latency of blocks and use of the processor, in both directions, past the page cache.
    The file is removed in any case. Of settings within 3 % of the fastest, the best is the one that
    keeps the fewest bytes under way.
    """
    from drivetrain_offload.bench.io_measure import best, scratch_file, sweep
    from drivetrain_offload.file_io import IOSettings

    wrong = [kib for kib in grid["block_size"] if kib % 4]
    if wrong:
        raise click.BadParameter(f"{wrong[0]} is no multiple of 4", param_hint="--block-size")
    wanted = product(grid["engine"], grid["block_size"], grid["queue_depth"], grid["threads"])
    settings = [
        IOSettings(kib << 10, depth, threads, engine=engine)
        for engine, kib, depth, threads in wanted
    ]
    nbytes = size // 16 * 16 << 20
    with scratch_file(path, nbytes) as file:
        rows = list(_shown(sweep(file, nbytes, settings, seconds), len(settings)))
    chosen = best(rows)
    if as_json:
        click.echo(json.dumps({"best": chosen.config(), "rows": [asdict(row) for row in rows]}))
        return
    _print_table(path, rows, chosen)
    click.echo(json.dumps(chosen.config(), indent=2))


def _shown(rows: Iterable[Row], number: int) -> Iterable[Row]:
    """The rows, with a bar on terminals."""
    from rich.console import Console
    from rich.progress import track

    return track(rows, "measuring", number, console=Console(stderr=True), transient=True)


def _print_table(path: Path, rows: Iterable[Row], chosen: Row) -> None:
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(
        title=f"reads and writes in {path}",
        title_justify="left",
        box=box.SIMPLE_HEAD,
        padding=0,
        show_edge=False,
        pad_edge=False,
    )
    table.add_column("\nengine", no_wrap=True)
    for column in ("block\nKiB", "\ndepth", "\nthreads"):
        table.add_column(column, justify="right", no_wrap=True)
    for direction in ("read", "write"):
        for unit in ("GB/s", "ms (p99)", "cores"):
            table.add_column(f"{direction}\n{unit}", justify="right", no_wrap=True)
    for row in rows:
        setting = row.settings
        numbers = (setting.block_size >> 10, setting.queue_depth, setting.intra_op_parallelism)
        cells = [row.engine, *map(str, numbers), *_cells(row.read), *_cells(row.write)]
        table.add_row(*cells, style="bold green" if row is chosen else None)
    Console().print(table)


def _cells(measured: Measurement) -> list[str]:
    return [
        f"{measured.bytes_per_second / 1e9:.2f}",
        f"{measured.mean_latency * 1e3:.1f} ({measured.p99_latency * 1e3:.1f})",
        f"{measured.cores:.2f}",
    ]
