"""Time one training step of mixtures of experts side by side, and print the ratios as JSON.

    python benchmarks/moe_step.py transformers-ddp drivetrain-mixtral:2
    python benchmarks/moe_step.py deepspeed-layer:2@/path/to/other/python drivetrain-layer:2 --k 2

At the default rate of learning, routers of Mixtral send nearly all tokens to two experts within
twenty steps, as nothing balances them, and a rank waits for the one that has these. With ``--rate
1e-5`` they stay as they were drawn, about as even as those that a balancing loss has trained.

``system:N`` shares out experts over N ranks; ``@interpreter`` runs a system under another Python,
for DeepSpeed's own, which has an environment of its own. Systems take steps in turn, as in
``train_step.py``. With ``--mbit`` (as root, on Linux) two ranks have a link of so many Mbit/s each
way between them, as in ``slow_link.py``, and share no memory:

    sudo python benchmarks/moe_step.py drivetrain-layer:2 drivetrain-halves:2 --mbit 1000
"""

from __future__ import annotations

import argparse
import json
import os
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from side_by_side import row, running, take_turns
from slow_link import hosts

WORKER = Path(__file__).with_name("moe_step_worker.py")
SHAPE = {
    "layers": 2,
    "width": 256,
    "inner": 512,
    "experts": 8,
    "k": 2,
    "batch": 2,
    "sequence": 256,
    "vocabulary": 512,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("systems", nargs="+")
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--pairs", type=int, default=40)
    parser.add_argument("--warmup", type=int, default=5)
    parser.add_argument(
        "--rate", type=float, default=1e-3, help="of learning; 1e-5 leaves routers as they begin"
    )
    parser.add_argument("--mbit", type=int, default=0, help="of a link between two ranks")
    for name, value in SHAPE.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    options = parser.parse_args()
    shape: dict[str, Any] = {name: getattr(options, name) for name in SHAPE}
    shape |= {"mbit": options.mbit, "rate": options.rate}
    with ExitStack() as stack:
        links = []
        if options.mbit:
            names = stack.enter_context(hosts(options.mbit))
            links = [(name, f"v{os.getpid()}{'ab'[at]}") for at, name in enumerate(names)]
        running_ones = running(options.systems, WORKER, shape, options.ranks, links=links)
        systems = stack.enter_context(running_ones)
        facts = {name: system.ready() for name, system in systems.items()}
        seconds = take_turns(systems, options.warmup, options.pairs)
        last = {name: system.close() for name, system in systems.items()}
    baseline = options.systems[0]
    rows = {
        name: {**facts[name], **last[name], **row(times, seconds[baseline], baseline)}
        for name, times in seconds.items()
    }
    print(
        json.dumps({"shape": shape, "date": time.strftime("%Y-%m-%d"), "systems": rows}, indent=1)
    )


if __name__ == "__main__":
    main()
