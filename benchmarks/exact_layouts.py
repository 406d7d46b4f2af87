"""Train a small GPT on twenty layouts, print one hash for each and the price of a step.

    python benchmarks/exact_layouts.py
    python benchmarks/exact_layouts.py --hashes
    python benchmarks/exact_layouts.py --hashes --plain
    python benchmarks/exact_layouts.py --price

Every layout trains for the same steps on the same global batch: 1, 2, 3 and 4 ranks, each without
ZeRO, at stages 1 to 3, and at stage 2 with states in host memory. With ``--plain`` the section
``exact`` is left out, to see how many hashes there are then. The price is the median time of a
step of two ranks with the section over that without it, in turn in one process each; bytes are
those that a rank sends in a step. ``--hashes`` and ``--price`` ask for one of these alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from itertools import product
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))

from gpt import GPT  # the examples' model

import drivetrain
from drivetrain.testing import run_distributed

CONTEXT, MICRO_BATCH, GLOBAL_BATCH = 32, 2, 24

HOMES: dict[str, dict[str, Any]] = {
    "replicated": {},
    "stage 1": {"stage": 1},
    "stage 2": {"stage": 2},
    "stage 3": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "stage 2, host": {"stage": 2, "offload_optimizer": {"device": "cpu"}},
}


def config(home: str, *, exact: bool) -> dict[str, Any]:
    keys: dict[str, Any] = {
        "train_batch_size": GLOBAL_BATCH,
        "train_micro_batch_size_per_gpu": MICRO_BATCH,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "gradient_clipping": 1.0,
    }
    if HOMES[home]:
        keys["zero_optimization"] = HOMES[home]
    if exact:
        keys["exact"] = {}
    return keys


def samples() -> list[dict[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randint(256, (480, CONTEXT + 1), generator=generator)
    return [{"tokens": row[:-1], "targets": row[1:]} for row in drawn]


def train(home: str, exact: bool, steps: int, width: int) -> tuple[str, float, float]:
    """The hash of all states, the median seconds of a step, and the bytes that it sends."""
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    torch.manual_seed(0)
    model = GPT(CONTEXT, layers=2, width=width, heads=4)
    engine = drivetrain.initialize(
        model=model, training_data=samples(), config=config(home, exact=exact)
    )[0]
    from drivetrain_exact import state_hash

    engine.train_batch()  # whose set-up sends more
    sent = sum(traffic.sent_bytes for _, traffic in engine.job.byte_log.items())
    seconds = []
    for _ in range(steps - 1):
        begin = time.perf_counter()
        engine.train_batch()
        seconds.append(time.perf_counter() - begin)
    sent = sum(traffic.sent_bytes for _, traffic in engine.job.byte_log.items()) - sent
    found = state_hash(engine)
    engine.destroy()
    return found, statistics.median(seconds), sent / (steps - 1)


def hashes(steps: int, width: int, *, exact: bool) -> dict[str, Any]:
    """The hash of each layout, and how many different ones there are."""
    found = {}
    for world, home in product((1, 2, 3, 4), HOMES):
        found[f"{world} ranks, {home}"] = run_distributed(train, world, home, exact, steps, width)[
            0
        ][0]
    return {"hashes": found, "steps": steps, "different": len(set(found.values()))}


def price() -> dict[str, Any]:
    """Time and bytes of a step of two ranks at stage 2, as parts of those of a plain one."""
    ratios, sent = [], []
    for _ in range(5):
        pair = [run_distributed(train, 2, "stage 2", e, 20, 256)[0] for e in (True, False)]
        ratios.append(pair[0][1] / pair[1][1])
        sent.append(pair[0][2] / pair[1][2])
    return {
        "price": round(statistics.median(ratios), 3),
        "prices": [round(ratio, 3) for ratio in sorted(ratios)],
        "bytes": round(max(sent), 3),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--width", type=int, default=32)
    parser.add_argument("--plain", action="store_true")
    parser.add_argument("--hashes", action="store_true")
    parser.add_argument("--price", action="store_true")
    given = parser.parse_args()
    shown: dict[str, Any] = {}
    if not given.price:
        shown |= hashes(given.steps, given.width, exact=not given.plain)
    if not given.hashes:
        shown |= price()
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
