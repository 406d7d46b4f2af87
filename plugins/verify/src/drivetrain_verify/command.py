"""``drivetrain verify``: some steps of a script, compared with plain torch."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import click

from drivetrain_verify.section import PATH

_PLACE = "{config}"


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option("--nproc", default="auto", help="Ranks on this machine; default: one per device.")
@click.option("--steps", default=5, show_default=True, help="Steps that are compared.")
@click.option("--factor", default=8.0, show_default=True, help="See the key of that name.")
@click.option(
    "--json", "as_json", is_flag=True, help="Print the verdict of each parameter as JSON."
)
@click.argument("config")
@click.argument("script")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED)
def verify(
    nproc: str,
    steps: int,
    factor: float,
    as_json: bool,
    config: str,
    script: str,
    arguments: tuple[str, ...],
) -> None:
    """Run SCRIPT with CONFIG and its ARGUMENTS, and compare its first steps with plain torch.

    In the arguments, {config} stands for a copy of CONFIG in which the comparison is switched on.
    The run ends after the last compared step, with exit code 0, or at the first parameter that is
    further off than rounding explains.
    """
    from drivetrain.plan.config.loading import load_config

    if not any(_PLACE in argument for argument in arguments):
        raise click.UsageError(
            f"no argument of {script} has {_PLACE}: write where it takes its config, e.g. "
            f"drivetrain verify {config} {script} --config '{_PLACE}'"
        )
    with tempfile.TemporaryDirectory(prefix="drivetrain-verify-") as folder:
        report = Path(folder, "verdict.json")
        changed = {
            **load_config(config),
            PATH: {"steps": steps, "factor": factor, "stop": True, "report": str(report)},
        }
        file = Path(folder, "config.json")
        file.write_text(json.dumps(changed), "utf-8")
        given = [argument.replace(_PLACE, str(file)) for argument in arguments]
        options = ["--nproc", nproc, "--log-dir", str(Path(folder, "logs"))]
        command = [sys.executable, "-m", "drivetrain.cli", "run", *options, script, *given]
        code = subprocess.run(command, check=False).returncode
        if code:  # the run has said why
            sys.exit(code)
        if not report.exists():
            raise click.ClickException(
                f"{script} ended before {steps} steps were compared: give it more to do, or fewer "
                "--steps"
            )
        _show(json.loads(report.read_text("utf-8")), as_json)


def _show(verdict: dict[str, Any], as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(verdict, indent=1))
        return
    worst = sorted(verdict["worst"], key=lambda found: -found["share"])
    parameters = {found["parameter"] for found in worst}
    click.echo(f"{verdict['steps']} steps of {len(parameters)} parameters agree with plain torch")
    click.echo("closest to the bound of rounding:")
    for found in worst[:5]:
        click.echo(
            f"  {found['share']:5.1%}  {found['kind']:8}  {found['parameter']}  "
            f"(step {found['step']})"
        )
