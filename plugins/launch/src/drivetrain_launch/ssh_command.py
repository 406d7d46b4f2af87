"""``drivetrain ssh``: a command on every host of a hostfile."""

from __future__ import annotations

import shlex
import sys
import tempfile
from pathlib import Path

import click

from drivetrain.cli import UserPath
from drivetrain.errors import DrivetrainError
from drivetrain_launch.hosts import choose, read_hostfile


@click.command(context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False})
@click.option(
    "-H",
    "-f",
    "--hostfile",
    default="/job/hostfile",
    show_default=True,
    type=UserPath(path_type=Path),
    help="Lines 'NAME slots=N'.",
)
@click.option("-i", "--include", default="", help="Hosts to use: NAME[@NAME...].")
@click.option("-e", "--exclude", default="", help="Hosts to leave out.")
@click.option("--ssh-port", type=int, help="Port of the hosts' ssh servers.")
@click.argument("command", nargs=-1, required=True, type=click.UNPROCESSED)
def ssh(
    hostfile: Path, include: str, exclude: str, ssh_port: int | None, command: tuple[str, ...]
) -> None:
    """Run COMMAND on every host of a hostfile, at the same time, and show what they say."""
    from drivetrain_launch.launchers.shells import ssh_command
    from drivetrain_launch.watch import Start, run_all

    hosts = choose(read_hostfile(hostfile), include=include, exclude=exclude)
    # One argument is a line for the shell there, several are a program and its arguments.
    line = command[0] if len(command) == 1 else shlex.join(command)
    starts = [Start(host.name, ssh_command(host.name, line, ssh_port)) for host in hosts]
    with tempfile.TemporaryDirectory() as folder:
        outcome = run_all(starts, Path(folder), grace=5.0)
    if outcome.signal:
        sys.exit(128 + outcome.signal)
    failed = {host: code for host, code in outcome.codes.items() if code}
    if failed:
        said = ", ".join(f"{host} (code {code})" for host, code in failed.items())
        raise DrivetrainError(f"the command failed on {said}")
