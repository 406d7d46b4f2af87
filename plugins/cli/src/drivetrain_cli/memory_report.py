"""``drivetrain report --memory``: what this machine has, and what a job would need."""

from __future__ import annotations

import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from drivetrain.plan.config.loading import load_config, overlay
from drivetrain_cli.machine import look
from drivetrain_cli.memory import Model, Ranks, forecast
from drivetrain_cli.memory_tables import (
    folders_in,
    forecast_table,
    machine_table,
    shortages,
)
from drivetrain_cli.stand_in import number_of_parameters
from drivetrain_cli.tables import show

if TYPE_CHECKING:
    from drivetrain.contracts import Accelerator
    from drivetrain_cli.report import MemoryRequest


def report_memory(request: MemoryRequest, accelerator: Accelerator | None) -> None:
    """Print it.

    Args:
        request: the command's options.
        accelerator: what a job gets here; ``None`` if nothing.

    Raises:
        ConfigError: the config is not one that a job would run, or the model cannot be made.
    """
    if request.config is None:
        if request.parameters or request.model:
            raise click.UsageError("a model's needs depend on the job; give its --config")
        show(machine_table(look(accelerator, (str(Path.cwd()),))))
        return
    merged = overlay(load_config(request.config), request.overlays)
    machine = look(accelerator, tuple(folders_in(merged)))
    on_cpu = accelerator is not None and accelerator.device_type == "cpu"
    if request.device is not None and on_cpu != (request.device == "cpu"):
        on_cpu = request.device == "cpu"
        machine = replace(machine, devices=0, device=machine.host if on_cpu else None)
    ranks = Ranks(request.nproc or max(1, machine.devices), request.nnodes, on_cpu)
    model = _model(request)
    expected = forecast(merged, model, ranks, sequence=request.sequence)
    count = ranks.per_machine * ranks.machines
    click.echo(f"{model.what} on {count} rank{'s'[: count != 1]}")
    show(forecast_table(expected, ranks, machine))
    for note in expected.notes:
        click.echo(f"note: {note}")
    for shortage in shortages(expected, ranks, machine):
        click.secho(f"too little: {shortage}", fg="red")


def _model(request: MemoryRequest) -> Model:
    if (request.parameters is None) == (request.model is None):
        raise click.UsageError("how large is the model? give either --parameters or --model")
    if request.model is not None:
        sys.path.insert(0, str(Path.cwd()))  # as for a script that is run here
        return Model.made_by(request.model, request.hidden)
    assert request.parameters is not None
    number = number_of_parameters(request.parameters)
    return Model.of_size(number, request.layers, request.hidden)
