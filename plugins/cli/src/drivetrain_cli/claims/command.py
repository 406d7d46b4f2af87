"""``drivetrain bench reproduce``: measure stated figures again, and say whether they hold here."""

from __future__ import annotations

import json
import shlex
import subprocess
import sys
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import click

from drivetrain.cli import UserPath
from drivetrain.errors import DrivetrainError
from drivetrain.wording import did_you_mean
from drivetrain_cli.claims.output import figure
from drivetrain_cli.claims.receipts import Receipt, files, load

_MISSED, _UNMEASURED = 1, 3


@dataclass(frozen=True)
class Outcome:
    """One figure, measured again.

    Args:
        claim: the id of its receipt.
        figure: which one.
        stated: what the page says.
        measured: what it is here; ``None`` where the command did not tell.
        holds: whether that is as good, or worse by no more than the tolerance.
        problem: why there is no number.
    """

    claim: str
    figure: str
    stated: float
    measured: float | None
    holds: bool
    problem: str = ""


def holds(receipt: Receipt, stated: float, measured: float) -> bool:
    """Whether a figure that is measured anew agrees with one that is stated."""
    room = receipt.tolerance * abs(stated)
    return measured <= stated + room if receipt.better == "lower" else measured >= stated - room


def measure(receipt: Receipt, root: Path, seconds: float | None) -> list[Outcome]:
    """Run the command of a receipt in ``root`` and look at each of its figures.

    Args:
        receipt: what is claimed.
        root: of the checkout.
        seconds: after which the command is ended; ``None`` for never.
    """
    command = [sys.executable, *shlex.split(receipt.command)[1:]]
    try:
        run = subprocess.run(
            command, cwd=root, check=False, text=True, stdout=subprocess.PIPE, timeout=seconds
        )
    except subprocess.TimeoutExpired:
        problem = f"the command did not end within {seconds:g} s"
    else:
        problem = f"the command ended with exit code {run.returncode}" if run.returncode else ""
    if problem:
        stated = receipt.figures.items()
        return [Outcome(receipt.id, name, number, None, False, problem) for name, number in stated]
    return [_judged(receipt, name, run.stdout) for name in receipt.figures]


def _judged(receipt: Receipt, name: str, output: str) -> Outcome:
    stated, measured = float(receipt.figures[name]), figure(output, name)
    if measured is None:
        problem = "the command printed no such figure"
        return Outcome(receipt.id, name, stated, None, False, problem)
    return Outcome(receipt.id, name, stated, measured, holds(receipt, stated, measured))


@click.command()
@click.option("--all", "everything", is_flag=True, help="Measure every claim.")
@click.option("--json", "as_json", is_flag=True, help="Print claims or outcomes as JSON.")
@click.option("--root", type=UserPath(path_type=Path), help="The checkout; default: around here.")
@click.option("--timeout", type=float, help="Seconds after which a command is ended.")
@click.argument("claims", nargs=-1)
def reproduce(
    everything: bool,
    as_json: bool,
    root: Path | None,
    timeout: float | None,
    claims: tuple[str, ...],
) -> None:
    """Measure CLAIMS again, and say whether they hold on this machine.

    A claim is a receipt of a BENCHMARKS.md in a checkout of Drivetrain. Without any, all are
    listed. Exit code 1: a figure does not hold; 3: one could not be measured.
    """
    place = _checkout(root)
    known = load(place)
    if not claims and not everything:
        _list(known, as_json)
        return
    if claims and everything:
        raise click.UsageError("--all measures every claim: name none")
    chosen = list(known) if everything else list(dict.fromkeys(claims))
    for name in chosen:
        if name not in known:
            raise click.UsageError(f"no claim is named {name!r}{did_you_mean(name, known)}")
    outcomes = list(_measured([known[name] for name in chosen], place, timeout, as_json))
    if as_json:
        click.echo(json.dumps([asdict(one) for one in outcomes], indent=1))
    if any(one.measured is None for one in outcomes):
        sys.exit(_UNMEASURED)
    sys.exit(0 if all(one.holds for one in outcomes) else _MISSED)


def _measured(
    receipts: list[Receipt], root: Path, timeout: float | None, quiet: bool
) -> Iterator[Outcome]:
    for receipt in receipts:
        if not quiet:
            click.echo(f"{receipt.id}: {receipt.command}")
            click.echo(f"  stated for {receipt.hardware}, {receipt.date}")
        for outcome in measure(receipt, root, timeout):
            if not quiet:
                click.echo(f"  {_said(outcome, receipt)}")
            yield outcome


def _said(outcome: Outcome, receipt: Receipt) -> str:
    if outcome.measured is None:
        return f"{outcome.figure}: stated {outcome.stated:g}, not measured: {outcome.problem}"
    verdict = "holds" if outcome.holds else "does NOT hold"
    return (
        f"{outcome.figure}: stated {outcome.stated:g}, here {outcome.measured:g}: {verdict} "
        f"({receipt.better} is better, tolerance {receipt.tolerance:.0%})"
    )


def _checkout(root: Path | None) -> Path:
    """The given checkout, or the one around the working directory.

    Raises:
        DrivetrainError: there are no figures.
    """
    here = Path.cwd()
    places = [root] if root is not None else [here, *here.parents]
    for place in places:
        if files(place):
            return place.resolve()
    where = root if root is not None else f"{here} or above it"
    raise DrivetrainError(
        f"there is no BENCHMARKS.md in {where}: figures are measured in a checkout of Drivetrain; "
        "go there, or tell --root"
    )


def _list(known: Mapping[str, Receipt], as_json: bool) -> None:
    if as_json:
        shown = [{**asdict(receipt), "date": str(receipt.date)} for receipt in known.values()]
        click.echo(json.dumps(shown, indent=1))
        return
    width = max(map(len, known), default=0)
    for name, receipt in known.items():
        click.echo(
            f"{name:{width}}  {receipt.date}  {len(receipt.figures)} figures  {receipt.command}"
        )
