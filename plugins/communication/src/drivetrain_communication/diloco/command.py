"""``drivetrain replicas``: the meeting point, and several replicas of a job on one machine."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence

import click

from drivetrain_communication.diloco.section import MEETING_POINT, REPLICA

_GRACE_SECONDS = 60.0
"""How long a replica may take to end after a signal."""


@click.group()
def replicas() -> None:
    """Let jobs train together that meet only now and then (section diloco)."""


@replicas.command()
@click.option(
    "--host", default="127.0.0.1", show_default=True, help="Name or address to listen at."
)
@click.option("--port", default=29600, show_default=True, help="0 takes a free one.")
def meet(host: str, port: int) -> None:
    """Run the meeting point, until it is interrupted."""
    import asyncio

    from drivetrain_communication.diloco.meeting_point import MeetingPoint

    try:
        point = MeetingPoint(host, port, click.echo)
    except OSError as error:
        raise click.ClickException(f"cannot listen at {host}:{port}: {error}") from None
    click.echo(f"replicas meet at {point.host}:{point.port}")
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        asyncio.run(point.serve())
    except KeyboardInterrupt:
        click.echo("the meeting point is closed")


@replicas.command(
    context_settings={"ignore_unknown_options": True, "allow_interspersed_args": False}
)
@click.option("--replicas", "count", type=click.IntRange(1), required=True, help="How many.")
@click.argument("arguments", nargs=-1, type=click.UNPROCESSED, required=True)
def run(count: int, arguments: tuple[str, ...]) -> None:
    """Start a meeting point and several replicas here: `drivetrain run ARGUMENTS` for each.

    Each replica finds its number in the variable DRIVETRAIN_REPLICA, and {replica} in ARGUMENTS is
    replaced by it. When one fails the others go on; the command fails at the end if any did.
    """
    import asyncio

    from drivetrain_communication.diloco.meeting_point import MeetingPoint

    point = MeetingPoint("127.0.0.1", 0, click.echo)
    threading.Thread(target=lambda: asyncio.run(point.serve()), daemon=True).start()
    started: list[subprocess.Popen[bytes]] = []
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for number in range(count):
            variables = {REPLICA: str(number), MEETING_POINT: f"{point.host}:{point.port}"}
            own = [argument.replace("{replica}", str(number)) for argument in arguments]
            command = [sys.executable, "-m", "drivetrain.cli", "run", *own]
            started.append(subprocess.Popen(command, env={**os.environ, **variables}))
        codes = [process.wait() for process in started]
    except KeyboardInterrupt:
        codes = _end(started)
    failed = [str(number) for number, code in enumerate(codes) if code]
    if failed:
        raise click.ClickException(f"replica {', '.join(failed)} of {count} failed")


def _end(started: Sequence[subprocess.Popen[bytes]]) -> list[int]:
    """Ask all to end, and wait for that."""
    for process in started:
        process.terminate()
    codes = []
    for process in started:
        try:
            codes.append(process.wait(_GRACE_SECONDS))
        except subprocess.TimeoutExpired:
            process.kill()
            codes.append(process.wait())
    return codes
