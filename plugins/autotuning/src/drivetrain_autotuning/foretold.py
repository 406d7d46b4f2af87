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

_EACH = 120
"""Seconds that a plan may take in the mean."""


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
    needs: int = 0
    fits: bool = True
    flops: int = 0
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
        file, out = Path(folder, "configs.json"), Path(folder, "plans.jsonl")
        file.write_text(json.dumps(configs), "utf-8")
        command = [sys.executable, "-m", "drivetrain.cli", "plans", str(file)]
        command += ["--ranks", str(ranks), "--out", str(out)]
        for option, value in plan.items():
            command += [] if value is None else [f"--{option}", str(value)]
        environment = {"OMP_NUM_THREADS": threads} | os.environ
        options: dict[str, Any] = {"capture_output": True, "text": True, "check": False}
        why = ""
        try:
            limit = _EACH * len(configs)
            done = subprocess.run(command, env=environment, timeout=limit, **options)
            why = done.stderr.strip()[-500:] if done.returncode else ""
        except subprocess.TimeoutExpired:
            why = f"no end after {limit} s"
        lines = out.read_text("utf-8").splitlines() if out.exists() else []
    found = [Foretold(**json.loads(line)) for line in lines if line.endswith("}")]
    if why and not found:
        raise click.ClickException(f"no config could be planned: {why}")
    if why:
        say(f"plans ended after {len(found)} of {len(configs)}: {why}")
    return {each.name: each for each in found}
