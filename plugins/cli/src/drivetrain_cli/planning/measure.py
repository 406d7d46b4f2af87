"""``drivetrain measure``: what this machine does in which time, for ``drivetrain plan``."""

from __future__ import annotations

import tempfile
from pathlib import Path

import click

from drivetrain.cli import UserPath


@click.command()
@click.argument("file", required=False, type=UserPath(dir_okay=False, path_type=Path))
@click.option(
    "--ranks",
    type=click.IntRange(1),
    default=1,
    show_default=True,
    help="Ranks of this machine whose collectives are measured; 1 measures none.",
)
@click.option(
    "--folder",
    type=UserPath(exists=True, file_okay=False, path_type=Path),
    help="Where the disk is measured; default: the folder of temporary files.",
)
@click.option(
    "--seconds",
    type=click.FloatRange(min=0, min_open=True),
    default=0.1,
    show_default=True,
    help="About how long to measure each thing.",
)
def measure(file: Path | None, ranks: int, folder: Path | None, seconds: float) -> None:
    """Measure this machine, and write a table of it to FILE (default: the user's cache).

    Products of matrices by size and dtype, memory, copies between host and device, collectives,
    a file. drivetrain plan reads the table to tell how long a step takes.
    """
    from drivetrain.job.accelerator_choice import choose_accelerator
    from drivetrain_cli.planning.machine_table import usual_place
    from drivetrain_cli.planning.measuring import (
        measure_collectives,
        measure_disk,
        measure_machine,
    )
    from drivetrain_cli.planning.overhead import overhead_of

    place = file or usual_place()
    accelerator = choose_accelerator()
    table = measure_machine(accelerator, seconds)
    table.disk = measure_disk(folder or Path(tempfile.gettempdir()))
    table.overhead = overhead_of(accelerator, seconds)
    if ranks > 1:
        table.collectives = measure_collectives(ranks)
    table.write(place)
    for name, curve in table.matmul.items():
        size, taken = curve[-1]
        click.echo(f"products in {name}: {size / taken / 1e9:,.1f} GFLOP/s")
    size, taken = table.memory[-1]
    click.echo(f"memory: {size / taken / 1e9:,.1f} GB/s")
    click.echo(f"an operator of Python: {table.overhead * 1e6:,.1f} us")
    click.echo(f"disk: {table.disk['write'] / 1e6:,.0f} MB/s written")
    click.echo(f"wrote {place}")
