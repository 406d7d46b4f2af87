"""What plans say of configs before any of them is tried."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click


@dataclass(frozen=True)
class Foretold:
    """What ``drivetrain plans`` says of a config.

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
    needs: int
    fits: bool
    flops: int
    samples: int
    seconds: float
    error: str


def foretell(
    configs: Mapping[str, Mapping[str, Any]],
    plan: Mapping[str, Any],
    ranks: int,
    say: Callable[[str], None],
) -> dict[str, Foretold]:
    """Plan configs.

    Args:
        configs: name -> config.
        plan: options of ``drivetrain plans`` -> value; ``None`` leaves one out.
        ranks: of this machine, that a trial has.
        say: is told how far it came, where it did not get to the end.

    Returns:
        Name -> what its plan says.

    Raises:
        click.ClickException: there is no plan at all, as options are wrong.
    """
    threads = str(max(1, (os.cpu_count() or 1) // ranks))
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "configs.json")
        file.write_text(json.dumps(configs), "utf-8")
        command = [
            sys.executable,
            "-m",
            "drivetrain.cli",
            "plans",
            str(file),
            "--ranks",
            str(ranks),
        ]
        for option, value in plan.items():
            command += [] if value is None else [f"--{option}", str(value)]
        environment = {"OMP_NUM_THREADS": threads} | os.environ
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    found = [Foretold(**json.loads(line)) for line in done.stdout.splitlines() if line[:1] == "{"]
    if done.returncode:
        why = done.stderr.strip()[-500:]
        if not found:
            raise click.ClickException(f"no config could be planned: {why}")
        say(f"plans ended after {len(found)} of {len(configs)}: {why}")
    return {each.name: each for each in found}
