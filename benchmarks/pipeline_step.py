"""Time one training step of pipelines side by side, and print the ratios as JSON.

    python benchmarks/pipeline_step.py torch drivetrain
    python benchmarks/pipeline_step.py torch torch:1f1b/5 drivetrain:zb_h1/measured
    python benchmarks/pipeline_step.py torch drivetrain deepspeed@/path/to/other/python

A decoder of ``--layers`` blocks is cut in the middle of its blocks (with several chunks, in equal
numbers of them), or where the name of a system says behind ``/``: after so many blocks (``torch``),
or by ``measured`` times (``drivetrain``), which are taken in its first, uncounted step. A step runs
``--micro-batches`` micro-batches and updates with AdamW. ``torch`` is
torch.distributed.pipelining, with one process for each stage as all systems. ``system:schedule``
runs another schedule than 1F1B: ``drivetrain`` all of its own; ``torch`` gpipe, interleaved and zb.
``system@interpreter`` runs a system under another Python, for peers that live in an environment of
their own. How systems take turns is told in ``side_by_side.py``. All start from the same values and
see the same data, so ``last_loss`` is the same but for rounding.
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

from side_by_side import row, running, take_turns

WORKER = Path(__file__).with_name("pipeline_step_worker.py")


@dataclass(frozen=True)
class Shape:
    """Model and batch; the defaults are the GPT of 34 M parameters."""

    layers: int = 8
    width: int = 512
    heads: int = 8
    vocabulary: int = 8192
    sequence: int = 128
    micro_batch: int = 2
    micro_batches: int = 8


def main() -> None:
    options = _arguments()
    shape = Shape(**{key: getattr(options, key) for key in Shape.__dataclass_fields__})
    with running(options.systems, WORKER, asdict(shape), options.stages) as systems:
        facts = {name: system.ready() for name, system in systems.items()}
        seconds = take_turns(systems, options.warmup, options.pairs)
        last = {name: system.close() for name, system in systems.items()}
    baseline = next(iter(seconds))
    tokens = shape.micro_batch * shape.sequence * shape.micro_batches
    result = {
        "command": "python benchmarks/pipeline_step.py " + " ".join(sys.argv[1:]),
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "date": time.strftime("%Y-%m-%d"),
        "stages": options.stages,
        "shape": asdict(shape),
        "systems": {
            name: {
                **facts[name],
                **last[name],
                "tokens_per_second": round(tokens / statistics.median(times), 1),
                **row(times, seconds[baseline], baseline),
            }
            for name, times in seconds.items()
        },
    }
    print(json.dumps(result, indent=1))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("systems", nargs="+", help="torch, drivetrain, deepspeed; see above")
    parser.add_argument("--stages", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=30, help="counted steps of each system")
    parser.add_argument("--warmup", type=int, default=3)
    for name, field in Shape.__dataclass_fields__.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=field.default)
    return parser.parse_args()


if __name__ == "__main__":
    main()
