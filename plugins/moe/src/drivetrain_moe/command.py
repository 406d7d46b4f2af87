"""``drivetrain moe``: what a run has written about its experts."""

from __future__ import annotations

from pathlib import Path

import click

from drivetrain.cli import UserPath
from drivetrain.errors import DrivetrainError


@click.group()
def moe() -> None:
    """Look at the experts of a run."""


@moe.command()
@click.argument("file", type=UserPath(path_type=Path, dir_okay=False))
@click.option(
    "-o", "--output", type=UserPath(path_type=Path, dir_okay=False), help="Write the picture here."
)
@click.option("--layer", help="Regular expression: show layers whose names have a match.")
@click.option(
    "--columns",
    type=click.IntRange(1, 2000),
    help="Cells of a row at most; by default 200, or fewer where there are many experts.",
)
def load(file: Path, output: Path | None, layer: str | None, columns: int | None) -> None:
    """Draw which experts the tokens of a run chose, over its steps: a heat map (SVG) by layer.

    FILE is what the run has written, as its config's moe.load.file says. Steps are put together
    where there are more than cells in a row; a cell has their mean. The picture is written beside
    FILE by default; numbers of each layer are printed.
    """
    from drivetrain_moe.heat_map import heat_map, read_history, summary

    history = read_history(file, layer)
    target = output or file.with_suffix(".svg")
    try:
        target.write_text(heat_map(history, file.name, columns), "utf-8")
    except OSError as error:
        raise DrivetrainError(f"{target} cannot be written: {error.strerror}") from error
    click.echo(summary(history), nl=False)
    click.echo(f"wrote {target}")
