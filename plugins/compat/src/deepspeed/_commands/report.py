"""``ds_report``: what works in this environment, over ``drivetrain report``."""

from __future__ import annotations

import click

from drivetrain.cli import main as drivetrain


@click.command()
@click.option("--hide_operator_status", is_flag=True, help="Accepted, has no effect.")
@click.option("--hide_errors_and_warnings", is_flag=True, help="Accepted, has no effect.")
def main(**_: bool) -> None:
    """Show system, torch, accelerators, plugins and kernels, as `drivetrain report` does."""
    drivetrain.main(["report"], prog_name="ds_report")
