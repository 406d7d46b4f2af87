"""``drivetrain ledger``: where the seconds of a run went."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import click

from drivetrain.cli import UserPath
from drivetrain.errors import DrivetrainError

_FILE = UserPath(path_type=Path, dir_okay=False)


@click.command()
@click.option("--html", type=_FILE, help="Write a page with the timeline of each rank here.")
@click.option("--trace", type=_FILE, help="Write a trace for chrome://tracing or Perfetto here.")
@click.option("--json", "as_json", is_flag=True, help="Print numbers as JSON.")
@click.argument("run", type=UserPath(path_type=Path, exists=True, file_okay=False))
def ledger(html: Path | None, trace: Path | None, as_json: bool, run: Path) -> None:
    """Show where the seconds of RUN went: a folder in which ranks have kept a ledger.

    Every second of every rank is in one column, from the start of the first process to the end of
    the last, and all attempts of a run that was started again count.
    """
    from drivetrain_profiler.ledger.page import page
    from drivetrain_profiler.ledger.reading import read_run
    from drivetrain_profiler.ledger.summary import summary
    from drivetrain_profiler.ledger.text import table
    from drivetrain_profiler.ledger.trace import chrome_trace

    attempts = read_run(run)
    found = summary(attempts)
    click.echo(json.dumps(asdict(found), indent=1) if as_json else table(found), nl=as_json)
    if html is not None:
        _write(html, lambda: page(attempts, found, run.name), quiet=as_json)
    if trace is not None:
        _write(trace, lambda: chrome_trace(attempts), quiet=as_json)


def _write(file: Path, make: Callable[[], str], *, quiet: bool) -> None:
    try:
        file.write_text(make(), "utf-8")
    except OSError as error:
        raise DrivetrainError(f"{file} cannot be written: {error.strerror}") from error
    if not quiet:
        click.echo(f"wrote {file}")
