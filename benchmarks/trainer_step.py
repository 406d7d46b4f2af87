"""Time a step of Transformers' Trainer on several systems side by side; prints JSON.

    python benchmarks/trainer_step.py ddp drivetrain:2 drivetrain:3
    python benchmarks/trainer_step.py ddp drivetrain:2 deepspeed:2@/path/to/other/python

``ddp`` is the Trainer as it comes, ``alone`` the same where every rank trains for itself: the time
of the model and of a whole update, without another rank. ``drivetrain:N`` is the Trainer with a
config of DeepSpeed for stage N, on the drop-in, and ``deepspeed:N@interpreter`` DeepSpeed itself in
an environment of its own, with Transformers and Accelerate. All others run in the test environment
``frameworks``, which is made if need be. A step is everything between the ends of two steps of the
Trainer's loop: batches, forward, backward, clipping, update and log.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from side_by_side import row, running, take_turns

ROOT = Path(__file__).resolve().parent.parent
WORKER = Path(__file__).with_name("trainer_step_worker.py")


@dataclass(frozen=True)
class Shape:
    """Model and batch: a GPT-2 of 3.7 M parameters."""

    layers: int = 4
    width: int = 256
    heads: int = 4
    vocabulary: int = 2048
    sequence: int = 64
    micro_batch: int = 4
    accumulation: int = 1


def main() -> None:
    options = _arguments()
    shape = Shape(**{key: getattr(options, key) for key in Shape.__dataclass_fields__})
    python = options.python or _interpreter()
    with running(options.systems, WORKER, asdict(shape), options.ranks, python) as systems:
        facts = {name: system.ready() for name, system in systems.items()}
        seconds = take_turns(systems, options.warmup, options.pairs)
        last = {name: system.close() for name, system in systems.items()}
    baseline = options.systems[0]
    rows = {
        name.partition("@")[0]: {
            **facts[name],
            **last[name],
            **row(times, seconds[baseline], baseline.partition("@")[0]),
        }
        for name, times in seconds.items()
    }
    result = {
        "command": "python benchmarks/trainer_step.py " + " ".join(sys.argv[1:]),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "rounds": options.pairs,
        "ranks": options.ranks,
        "shape": asdict(shape),
        "systems": rows,
    }
    print(json.dumps(result, indent=1))


def _interpreter() -> str:
    """The Python of the test environment ``frameworks``, with packages built as they are now."""
    tox = [sys.executable, "-m", "tox", "exec", "-qq", "-e", "frameworks", "--"]
    code = "import sys; print(sys.executable)"
    done = subprocess.run(
        [*tox, "python", "-c", code], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    return done.stdout.split()[-1]


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "systems", nargs="+", help="ddp, alone, drivetrain:N, deepspeed:N@interpreter"
    )
    parser.add_argument("--python", help="interpreter to use in place of that environment's")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=60, help="rounds that are counted")
    parser.add_argument("--warmup", type=int, default=5)
    for key, field in Shape.__dataclass_fields__.items():
        parser.add_argument(
            f"--{key.replace('_', '-')}", type=type(field.default), default=field.default
        )
    return parser.parse_args()


if __name__ == "__main__":
    main()
