"""``drivetrain bench NAME``: measures a part of this machine; packages bring the measurements."""

from __future__ import annotations

import click

from drivetrain.cli import Commands
from drivetrain.plan.registry import Group


class Benchmarks(Commands):
    """Entry points of the group ``drivetrain.bench``: a command each."""

    kind: Group = "bench"
    called = "benchmark"


@click.group(cls=Benchmarks)
def bench() -> None:
    """Measure what this machine does: disks, links between ranks."""
