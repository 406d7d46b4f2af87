"""``drivetrain plans``: many configs of one job beside each other, a line of JSON for each."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from drivetrain.cli import UserPath
from drivetrain.errors import DrivetrainError
from drivetrain_cli.planning.plan_command import Bytes

if TYPE_CHECKING:
    from drivetrain_cli.planning.machine_table import MachineTable
    from drivetrain_cli.planning.rehearsed import Rehearsed

_SECONDS = 0.01
"""About how long an operator is timed."""


@dataclass(frozen=True)
class Line:
    """What a plan says of a config.

    Args:
        name: of the config.
        needs: bytes of a device.
        fits: whether there are as many; true where that is not known.
        flops: operations of products of one rank in a step.
        samples: of all ranks in one step.
        seconds: of a step.
        error: why there is no plan; empty if there is.
    """

    name: str
    needs: int = 0
    fits: bool = True
    flops: int = 0
    samples: int = 0
    seconds: float = 0.0
    error: str = ""


@click.command("plans")
@click.argument("configs", type=UserPath(exists=True, dir_okay=False, path_type=Path))
@click.option("--model", required=True, metavar="M", help="See drivetrain plan.")
@click.option("--inputs", metavar="MODULE:FUNCTION", help="See drivetrain plan.")
@click.option("--sequence", type=click.IntRange(1), help="Tokens of a sample.")
@click.option("--ranks", type=click.IntRange(1), default=1, show_default=True, help="Of one host.")
@click.option("--memory", type=Bytes(), help="Of a device, e.g. 80G; on a CPU, of a rank.")
@click.option("--device", type=click.Choice(["cpu", "gpu"]), default="gpu", show_default=True)
@click.option(
    "--machine",
    type=UserPath(dir_okay=False, path_type=Path),
    help="A table by drivetrain measure; default: that of the user's cache, or a short one.",
)
@click.option("--out", type=UserPath(dir_okay=False, path_type=Path), help="Write the lines here.")
def plans(
    configs: Path,
    model: str,
    inputs: str | None,
    sequence: int | None,
    ranks: int,
    memory: int | None,
    device: str,
    machine: Path | None,
    out: Path | None,
) -> None:
    """Plan the configs of CONFIGS, a JSON object: name -> config. A line of JSON for each.

    As drivetrain plan does it for one, in half a second each: bytes that a device needs, whether
    they fit, operations, samples and seconds of a step, or why there is no plan. Operators are run
    once each on this machine, so that times are those of jobs that run here. drivetrain tune begins
    with it.
    """
    from drivetrain_cli.memory import Ranks
    from drivetrain_cli.planning.subject import subject_of

    sys.path.insert(0, str(Path.cwd()))  # as for a script that is run here
    try:
        given: Mapping[str, Any] = json.loads(configs.read_text("utf-8"))
        if not all(isinstance(config, dict) for config in given.values()):
            raise TypeError("a config is an object")
    except (ValueError, AttributeError, TypeError) as error:
        raise click.UsageError(
            f"{configs} is no JSON object of configs by name: {error}"
        ) from error
    subject = subject_of(model, inputs, sequence)
    table, timed = _machine(machine, ranks)
    with nullcontext() if out is None else out.open("w", encoding="utf-8") as file:
        for line in lines(given, subject, Ranks(ranks, 1, device == "cpu"), memory, table, timed):
            click.echo(json.dumps(asdict(line)), file)


def lines(
    configs: Mapping[str, Mapping[str, Any]],
    subject: Any,
    ranks: Any,
    memory: int | None,
    table: MachineTable,
    timed: Callable[[MachineTable, Rehearsed], None],
) -> Iterator[Line]:
    """Plan one config after another."""
    from drivetrain_cli.planning.verdict import Question, answer

    world = ranks.per_machine
    for name, config in configs.items():
        question = Question(config, subject, ranks, world, memory, table, False, False)
        try:
            verdict = answer(question, timed)
        except Exception as error:  # noqa: BLE001 - what a model raises is what is told of it
            told = "" if isinstance(error, DrivetrainError) else f"{type(error).__name__}: "
            yield Line(name, error=f"{told}{error}")
            continue
        assert verdict.price is not None
        samples, price = verdict.ranks[0].samples, verdict.price
        yield Line(name, verdict.needs, verdict.fits, price.flops, samples, price.seconds)


def _machine(
    file: Path | None, ranks: int
) -> tuple[MachineTable, Callable[[MachineTable, Rehearsed], None]]:
    """The table of this machine, and what adds operators to it."""
    from drivetrain.job.accelerator_choice import choose_accelerator
    from drivetrain_cli.planning.machine_table import MachineTable, usual_place
    from drivetrain_cli.planning.measuring import (
        measure_collectives,
        measure_machine,
        time_operators,
    )
    from drivetrain_cli.planning.overhead import overhead_of

    accelerator = choose_accelerator()
    if file is not None or usual_place().exists():
        table = MachineTable.read(file or usual_place())
    else:
        table = measure_machine(accelerator, _SECONDS)
        table.overhead = overhead_of(accelerator, _SECONDS)
    if ranks > 1 and not table.collectives:
        try:
            table.collectives = measure_collectives(ranks)
        except DrivetrainError as error:
            click.echo(f"without times of collectives: {error}", err=True)

    def timed(table: MachineTable, rehearsed: Rehearsed) -> None:
        ran = rehearsed.operators.found.values()
        missing = [each for each in ran if each.signature not in table.operators]
        table.operators |= time_operators(missing, accelerator, _SECONDS)

    return table, timed
