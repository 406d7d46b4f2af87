"""What monitors take from a step of 20 values, and how fast values reach an endpoint, as JSON.

    python benchmarks/monitors.py

One process trains a GPT of 6.5 million parameters with all monitors that need no server (W&B
offline). ``part_of_step`` is the time that the process spends in a monitor, its last write
included, over the time of all steps. Then a script shows 1,000 values ``--rounds`` times, and
scrapes the Prometheus endpoint each time: ``values_per_second`` is how many it has shown and found
there in a second, ``arrived`` the part that was there.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import torch
from prometheus_client.parser import text_string_to_metric_families

import drivetrain
from drivetrain import monitor
from drivetrain.monitor import write_events
from drivetrain.testing.models import TinyGPT

NAMES = ("csv_monitor", "json_lines", "prometheus", "tensorboard", "wandb")
VALUES = 20


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--rounds", type=int, default=10)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=".") as folder:
        found = measured(Path(folder).resolve(), options.steps, options.rounds)
    print(json.dumps(found, indent=2))


def measured(folder: Path, steps: int, rounds: int) -> dict[str, Any]:
    """The figures of one process."""
    os.environ |= {"WANDB_MODE": "offline", "WANDB_SILENT": "true", "WANDB_DIR": str(folder)}
    torch.manual_seed(0)
    torch.set_num_threads(1)
    sections = {name: {"enabled": True, "output_path": str(folder)} for name in NAMES}
    sections["prometheus"] = {"enabled": True, "port": 0}
    sections["wandb"] = {"enabled": True}
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        **sections,
    }
    spent = timed_buffers()
    engine: Any = drivetrain.initialize(model=TinyGPT(512, 256, 8, positions=128), config=config)[0]
    ids = torch.randint(512, (4, 128))
    seconds = []
    for step in range(steps + 3):
        if step == 3:  # writers are open, and compiled is what is compiled
            spent.clear()
        began = time.perf_counter()
        engine.backward(engine(ids, ids))
        engine.step()
        place = engine.global_samples
        write_events(engine, [(f"own/value_{n}", float(step), place) for n in range(VALUES)])
        seconds.append(time.perf_counter() - began)
    buffers = {name: engine.job.hub.plugins[name].buffer(engine) for name in NAMES}
    for name, buffer in buffers.items():
        began = time.perf_counter()
        buffer._write()
        spent[name] += time.perf_counter() - began
    held = dict(spent)
    rate = arrived(engine, buffers["prometheus"]._writer.port, rounds)
    engine.destroy()
    engine.job.close()
    total = sum(seconds[3:])
    return {
        "step_median": round(statistics.median(seconds[3:]), 4),
        "values": VALUES,
        "monitors": {name: {"part_of_step": round(held[name] / total, 5)} for name in NAMES},
        "endpoint": rate,
    }


def timed_buffers() -> dict[str, float]:
    """Monitor -> seconds that its part of this process has taken; grows."""
    spent: dict[str, float] = defaultdict(float)
    buffer: Any = monitor._Buffer

    def timed(call: Callable[..., None]) -> Callable[..., None]:
        def wrapper(self: Any, *arguments: Any) -> None:
            began = time.perf_counter()
            call(self, *arguments)
            spent[self._monitor.name] += time.perf_counter() - began

        return wrapper

    for name in ("add_report", "add_events"):
        setattr(buffer, name, timed(getattr(buffer, name)))
    return spent


def arrived(engine: Any, port: int, rounds: int) -> dict[str, float]:
    """Show 1,000 values in every round, and look for them at the endpoint."""
    found = 0
    began = time.perf_counter()
    for number in range(rounds):
        place = engine.global_samples
        write_events(engine, [(f"many/value_{n}", number + n, place) for n in range(1000)])
        with urlopen(f"http://127.0.0.1:{port}/metrics", timeout=30) as answer:
            families = text_string_to_metric_families(answer.read().decode())
            seen = {s.name: s.value for family in families for s in family.samples}
        found += sum(seen.get(f"drivetrain_many_value_{n}") == number + n for n in range(1000))
    seconds = time.perf_counter() - began
    return {"values_per_second": round(found / seconds), "arrived": found / (1000 * rounds)}


if __name__ == "__main__":
    main()
