"""Measure what activations in files save and cost on ranks that compute on a CPU, as a table.

    python benchmarks/activation_offload.py --folder /path/on/the/disk

A GPT of 26 million parameters, one rank of one thread, AdamW, 1,024 tokens a step. Memory is the
peak of a process, less what it held before its first step; time is the median step of a process.
Both are medians of processes that take turns. Large blocks are mapped by themselves
(``MALLOC_MMAP_THRESHOLD_``): glibc otherwise keeps what is freed, and the peak would not tell.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

TOKENS = (2, 512)
STEPS = 3
ROUNDS = 3
MIB = 1 << 20


def main() -> None:
    """Print a line for each setting."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, default=Path("runs/swap"))
    parser.add_argument("--worker", default="")
    arguments = parser.parse_args()
    if arguments.worker:
        print(json.dumps(measure(json.loads(arguments.worker))))
        return
    arguments.folder.mkdir(parents=True, exist_ok=True)
    away = {"enabled": True, "device": "nvme", "nvme_path": str(arguments.folder)}
    settings = {"kept": {}, "in files": {"activation_offload": away}}
    found: dict[str, list[dict[str, float]]] = {name: [] for name in settings}
    for _ in range(ROUNDS):
        for name, sections in settings.items():
            command = [sys.executable, __file__, "--worker", json.dumps(sections)]
            environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": str(256 << 10)}
            done = subprocess.run(
                command, env=environment, check=True, capture_output=True, text=True
            )
            found[name].append(json.loads(done.stdout.splitlines()[-1]))
    print("| activations | memory of steps, MiB | MiB in files | seconds a step |")
    print("|---|---|---|---|")
    for name, results in found.items():
        cells = [
            statistics.median(r[key] for r in results) for key in ("memory", "away", "seconds")
        ]
        print(f"| {name} | {cells[0]:,.0f} | {cells[1]:,.0f} | {cells[2]:.2f} |")


def measure(sections: dict[str, Any]) -> dict[str, float]:
    """Peak memory of steps in MiB, MiB that were away, and the median time of a step."""
    import torch
    from drivetrain_offload import memory_table

    import drivetrain
    from drivetrain.testing.models import TinyGPT

    torch.set_num_threads(1)
    torch.manual_seed(0)
    module = TinyGPT(1000, 512, 8, heads=8, positions=TOKENS[1])
    config = {"train_batch_size": TOKENS[0], "optimizer": {"type": "AdamW"}, "accelerator": "cpu"}
    engine, *_ = drivetrain.initialize(model=module, config={**config, **sections})
    tokens = torch.randint(1000, (TOKENS[0], TOKENS[1] + 1))
    seconds, away, before = [], 0.0, _resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts anew
    for _ in range(STEPS):
        began = time.perf_counter()
        loss = engine(tokens[:, :-1], tokens[:, 1:])
        away = sum(row.nbytes for row in memory_table(engine) if row.kind == "activations") / MIB
        engine.backward(loss)
        del loss
        engine.step()
        seconds.append(time.perf_counter() - began)
    memory = (_resident("VmHWM") - before) / 1024
    engine.destroy()
    return {"memory": memory, "away": away, "seconds": statistics.median(seconds[1:])}


def _resident(key: str) -> int:
    """A line of this process's status, in KiB."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1])
    raise ValueError(f"/proc/self/status has no {key}")


if __name__ == "__main__":
    main()
