"""Time one training step of several systems side by side, and print the ratios as JSON.

    python benchmarks/train_step.py ddp drivetrain
    python benchmarks/train_step.py ddp drivetrain --accumulation 4 --dtype bf16 --pairs 150
    python benchmarks/train_step.py ddp drivetrain:2 deepspeed:2@/path/to/other/python fsdp2

Every system runs in ranks of its own. The controller lets them take steps in turn, one step each,
round after round, so that all see the same machine at the same time; the ratio of two systems is
the median of the per-round ratios to the first system named, with a 95 % interval from order
statistics. ``system:N`` runs ZeRO stage N; ``system:N+host`` keeps its
optimizer states in host memory, ``system:N+nvme`` in files under ``--nvme-path``, and
``system:3+nvme-params`` the parameters too, and ``system:3+nvme-small`` both with little memory for
buffers and gathered units. ``system@interpreter`` runs a system under another
Python, for peers that live in an environment of their own.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from side_by_side import Facts, row, running, take_turns

WORKER = Path(__file__).with_name("train_step_worker.py")


@dataclass(frozen=True)
class Shape:
    """Model and batch; the defaults are the GPT of 34 M parameters."""

    layers: int = 8
    width: int = 512
    heads: int = 8
    vocabulary: int = 8192
    sequence: int = 128
    micro_batch: int = 2
    accumulation: int = 1
    dtype: str = "fp32"
    clipping: float = 0.0
    nvme_path: str = ""


def main() -> None:
    options = _arguments()
    shape = Shape(**{key: getattr(options, key) for key in Shape.__dataclass_fields__})
    with running(options.systems, WORKER, asdict(shape), options.ranks) as systems:
        facts = {name: system.ready() for name, system in systems.items()}
        seconds = take_turns(systems, options.warmup, options.pairs)
        last = {name: system.close() for name, system in systems.items()}
    print(json.dumps(_result(options, shape, facts, seconds, last), indent=1))


def _result(
    options: argparse.Namespace,
    shape: Shape,
    facts: dict[str, Facts],
    seconds: dict[str, list[float]],
    last: dict[str, Facts],
) -> Facts:
    baseline = next(iter(seconds))
    tokens = shape.micro_batch * shape.sequence * shape.accumulation * options.ranks
    rows = {}
    for name, times in seconds.items():
        rows[name] = {
            **facts[name],
            **last[name],
            "tokens_per_second": round(tokens / statistics.median(times), 1),
            **row(times, seconds[baseline], baseline),
        }
    return {
        "command": "python benchmarks/train_step.py " + " ".join(sys.argv[1:]),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "rounds": options.pairs,
        "ranks": options.ranks,
        "shape": asdict(shape),
        "systems": rows,
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument(
        "systems",
        nargs="+",
        help="ddp, drivetrain, deepspeed, fsdp2; the first is the baseline; system:N for ZeRO "
        "stage N, system@interpreter for another Python",
    )
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=100, help="rounds that are counted")
    parser.add_argument("--warmup", type=int, default=5)
    for key, field in Shape.__dataclass_fields__.items():
        kind = type(field.default)
        parser.add_argument(f"--{key.replace('_', '-')}", type=kind, default=field.default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
