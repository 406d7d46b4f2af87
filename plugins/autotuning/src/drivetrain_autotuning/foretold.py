"""What plans say of configs before any of them is tried.

All are planned in one process of its own, which is given them in a file and prints a line for each.
Operators of their steps are run one by one, since the trials will run on the same machine.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from drivetrain.errors import DrivetrainError

if TYPE_CHECKING:
    from drivetrain_cli.planning.machine_table import MachineTable
    from drivetrain_cli.planning.rehearsed import Rehearsed

_SECONDS = 0.01
"""About how long an operator is timed."""


@dataclass(frozen=True)
class Foretold:
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
    flops: float = 0.0
    samples: int = 0
    seconds: float = 0.0
    error: str = ""


def foretell(
    configs: Mapping[str, Mapping[str, Any]],
    plan: Mapping[str, Any],
    ranks: int,
    say: Callable[[str], None],
) -> dict[str, Foretold]:
    """Plan configs.

    Args:
        configs: name -> config.
        plan: options of ``drivetrain plan``: ``model``, ``inputs``, ``sequence``, ``memory``
            (bytes), ``device``.
        ranks: of this machine, that a trial has.
        say: is told how far it is.

    Returns:
        Name -> what its plan says. Where the process ended before its time, some are missing.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "configs.json")
        file.write_text(json.dumps({"configs": configs, "plan": plan, "ranks": ranks}), "utf-8")
        threads = str(max(1, (os.cpu_count() or 1) // ranks))
        environment = {"OMP_NUM_THREADS": threads} | os.environ
        command = [sys.executable, "-m", "drivetrain_autotuning.foretold", str(file)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [Foretold(**json.loads(line)) for line in done.stdout.splitlines() if line[:1] == "{"]
    if done.returncode:
        say(f"plans ended after {len(found)} of {len(configs)}: {done.stderr.strip()[-300:]}")
    return {each.name: each for each in found}


def plans(
    configs: Mapping[str, Mapping[str, Any]], plan: Mapping[str, Any], ranks: int
) -> Iterator[Foretold]:
    """Plan one config after another; see :func:`foretell`."""
    from drivetrain_cli.memory import Ranks
    from drivetrain_cli.planning.subject import subject_of
    from drivetrain_cli.planning.verdict import Question, answer

    table, timed = _machine(ranks)
    on_cpu = plan.get("device") == "cpu"
    subject = subject_of(plan["model"], plan.get("inputs"), plan.get("sequence"))
    for name, config in configs.items():
        question = Question(
            config, subject, Ranks(ranks, 1, on_cpu), ranks, plan.get("memory"), table, False, False
        )
        try:
            verdict = answer(question, timed)
        except DrivetrainError as error:
            yield Foretold(name, error=str(error))
            continue
        assert verdict.price is not None
        samples, price = verdict.ranks[0].samples, verdict.price
        yield Foretold(name, verdict.needs, verdict.fits, price.flops, samples, price.seconds)


def _machine(ranks: int) -> tuple[MachineTable, Callable[[MachineTable, Rehearsed], None]]:
    """The table of this machine, and what adds operators to it."""
    from drivetrain_cli.planning.machine_table import MachineTable, usual_place
    from drivetrain_cli.planning.measuring import (
        measure_collectives,
        measure_machine,
        time_operators,
    )
    from drivetrain_cli.planning.overhead import overhead_of

    from drivetrain.job.accelerator_choice import choose_accelerator

    accelerator = choose_accelerator()
    if usual_place().exists():
        table = MachineTable.read(usual_place())
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


def main() -> None:
    """Plan the configs of a file; a line of JSON for each."""
    given = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    sys.path.insert(0, str(Path.cwd()))  # as for a script that is run here
    for each in plans(given["configs"], given["plan"], given["ranks"]):
        click.echo(json.dumps(asdict(each)))  # which flushes


if __name__ == "__main__":
    main()
