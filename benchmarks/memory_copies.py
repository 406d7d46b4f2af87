"""Measure copies of a job's state in memory on two ranks, as JSON.

    python benchmarks/memory_copies.py

A GPT of 6.5 million parameters with AdamW at ZeRO's second stage. ``copy`` is the time in which all
ranks make a copy, ``load`` that in which they go back to it, ``disk`` that of a checkpoint in a
folder; medians in seconds of calls that take turns. ``copy_of_disk`` is the ratio of the first to
the last. ``megabytes`` is what a copy holds.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from drivetrain_elasticity.keeper import OWNER

import drivetrain
from drivetrain.checkpoint.format.storage import open_storage
from drivetrain.testing import run_distributed
from drivetrain.testing.models import TinyGPT

PLACE = "keeper://bench"


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--rounds", type=int, default=7)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory(dir=".") as folder:
        found = run_distributed(
            measured, 2, str(Path(folder).resolve()), rounds, env={OWNER: str(os.getpid())}
        )
    print(json.dumps(found[0], indent=2))


def measured(folder: str, rounds: int) -> dict[str, float]:
    """What one rank sees."""
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 2},
    }
    engine: Any = drivetrain.initialize(model=TinyGPT(512, 256, 8), config=config)[0]
    ids = torch.randint(512, (1, 32))
    engine.backward(engine(ids, ids))
    engine.step()
    calls: dict[str, Callable[[], object]] = {
        "copy": lambda: engine.save_checkpoint(PLACE, "copy"),
        "disk": lambda: engine.save_checkpoint(folder, "disk"),
        "load": lambda: engine.load_checkpoint(PLACE, "copy"),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name, call in calls.items():
            began = time.perf_counter()
            call()
            seconds[name].append(time.perf_counter() - began)
    medians = {name: statistics.median(values) for name, values in seconds.items()}
    storage = open_storage(PLACE)
    size = sum(storage.size(f"copy/{name}") or 0 for name in storage.names("copy"))
    engine.destroy()
    engine.job.close()
    return {
        **{name: round(value, 4) for name, value in medians.items()},
        "copy_of_disk": round(medians["copy"] / medians["disk"], 3),
        "megabytes": round(size / 1e6, 1),
    }


if __name__ == "__main__":
    main()
