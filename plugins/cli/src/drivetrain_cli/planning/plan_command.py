"""``drivetrain plan``: what a job would take and how long, before anything runs."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from drivetrain.cli import UserPath
from drivetrain_cli.config import OVERLAY_OPTION

if TYPE_CHECKING:
    from drivetrain_cli.planning.machine_table import MachineTable
    from drivetrain_cli.planning.rehearsed import Rehearsed
    from drivetrain_cli.planning.verdict import Verdict

_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40}


class Bytes(click.ParamType):  # type: ignore[type-arg]  # generic from click 8.4 on
    """Bytes, such as 80G or 512M (binary)."""

    name = "size"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value).strip().lower().removesuffix("ib").removesuffix("b")
        found = re.fullmatch(r"([0-9]+(?:\.[0-9]+)?)([kmgt]?)", text)
        if found is None or not (nbytes := int(float(found[1]) * _UNITS[found[2]])):
            self.fail(f"{value!r} is no size such as 80G or 512M", param, ctx)
        return nbytes


@click.command("plan")
@click.argument("config")
@OVERLAY_OPTION
@click.option(
    "--model",
    required=True,
    metavar="M",
    help="MODULE:FUNCTION or FILE.py:FUNCTION that makes it, or the folder or JSON file of a "
    "config of Transformers.",
)
@click.option("--inputs", metavar="MODULE:FUNCTION", help="Makes a batch of (samples, tokens).")
@click.option("--sequence", type=click.IntRange(1), help="Tokens of a sample.")
@click.option("--gpus", type=click.IntRange(1), default=1, show_default=True, help="Ranks.")
@click.option(
    "--per-machine", type=click.IntRange(1), help="Ranks on a machine; default: 8 or all."
)
@click.option("--memory", type=Bytes(), help="Of a device, e.g. 80G; on a CPU, of a rank.")
@click.option(
    "--device",
    type=click.Choice(["cpu", "gpu"]),
    default="gpu",
    show_default=True,
    help="What ranks compute on.",
)
@click.option(
    "--machine",
    type=UserPath(dir_okay=False, path_type=Path),
    help="A table by drivetrain measure; default: that of the user's cache, if there is one.",
)
@click.option(
    "--here", is_flag=True, help="Run each operator once on this machine, to price it by itself."
)
@click.option("--largest/--no-largest", default=True, help="Find the largest micro-batch.")
@click.option("--ways-out/--no-ways-out", default=True, help="Find what would fit, if it does not.")
@click.option("--json", "as_json", is_flag=True, help="Print all of it as JSON.")
@click.option("--html", type=UserPath(dir_okay=False, path_type=Path), help="Write a page here.")
def plan(as_json: bool, html: Path | None, **options: Any) -> None:
    """Tell what the job of CONFIG would take, before anything runs.

    Its engine is put together and runs two steps, of tensors without memory and beside ranks that
    do not exist: so it is the code of plugins that decides, whichever they are. Shows every derived
    value and where it comes from, memory by phase, bytes between ranks, the time of a step by the
    table of a machine, and the largest micro-batch that fits.

    Exit code 1 if the job does not fit into --memory; what would is told.
    """
    from drivetrain_cli.planning.plan_page import page
    from drivetrain_cli.planning.plan_tables import as_data, show_plan

    sys.path.insert(0, str(Path.cwd()))  # as for a script that is run here
    verdict = _verdict(**options)
    if as_json:
        click.echo(json.dumps(as_data(verdict), indent=1, default=str))
    elif html is None:
        show_plan(verdict)
    if html is not None:
        html.write_text(page(verdict, options["config"]), "utf-8")
        click.echo(f"wrote {html}", err=as_json)
    if not verdict.fits:
        sys.exit(1)


def _verdict(
    config: str,
    overlays: Sequence[str],
    model: str,
    inputs: str | None,
    sequence: int | None,
    gpus: int,
    per_machine: int | None,
    memory: int | None,
    device: str,
    machine: Path | None,
    here: bool,
    largest: bool,
    ways_out: bool,
) -> Verdict:
    from drivetrain.plan.config.loading import load_config, overlay
    from drivetrain_cli.memory import Ranks
    from drivetrain_cli.planning.subject import subject_of
    from drivetrain_cli.planning.verdict import Question, answer

    merged = overlay(load_config(config), overlays)
    on_host = per_machine or min(gpus, 8)
    ranks = Ranks(on_host, max(1, -(-gpus // on_host)), device == "cpu")
    subject = subject_of(model, inputs, sequence)
    found = _table(machine)
    question = Question(merged, subject, ranks, gpus, memory, found, largest, ways_out)
    return answer(question, _timed if here else None)


def _table(machine: Path | None) -> MachineTable | None:
    from drivetrain_cli.planning.machine_table import MachineTable, usual_place

    if machine is None and not usual_place().exists():
        return None
    return MachineTable.read(machine or usual_place())


def _timed(table: MachineTable, found: Rehearsed) -> None:
    """Add the times of a rehearsal's operators to the table."""
    from drivetrain.job.accelerator_choice import choose_accelerator
    from drivetrain_cli.planning.measuring import time_operators
    from drivetrain_cli.planning.rehearsed import LAST, REPEATED

    ran = {o.signature: o for part in (REPEATED, LAST) for o in found.operators.in_window(part)}
    missing = [o for signature, o in ran.items() if signature not in table.operators]
    table.operators |= time_operators(missing, choose_accelerator(), 0.02)
