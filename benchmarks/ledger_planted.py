"""Plant delays in a run, and see in which column of its ledger they are, as JSON.

    python benchmarks/ledger_planted.py

Each delay is a sleep whose real length is taken where it is planted, so a busy machine that wakes
sleepers late makes no error. ``error`` is how far the column is from it, as a part of it:

- ``data``: 200 ms before each micro-batch.
- ``slow rank``: 500 ms in each forward of rank 1. ``waiting`` is what rank 0 waits more than rank 1
  in communication, ``computing`` what rank 1 computes more.
- ``disk``: each fsync of a checkpoint takes 1 s more than in the checkpoint before, on one rank, as
  several would wait for each other's disks.
- ``compile``: a compiler's back end takes 8 s, over another compilation in the same process.

``sum`` is the largest distance of the sum of all columns from a run's wall time, as a part of it.
"""

from __future__ import annotations

import json
import os
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from drivetrain_profiler.ledger.reading import Step, read_run
from drivetrain_profiler.ledger.summary import Summary, summary
from torch import nn

import drivetrain
from drivetrain.testing import run_distributed

STEPS = 8


class Sleeper:
    """Sleeps, and knows how long that really took."""

    def __init__(self) -> None:
        self.slept = 0.0

    def sleep(self, seconds: float) -> None:
        if seconds:
            begun = time.perf_counter()
            time.sleep(seconds)
            self.slept += time.perf_counter() - begun


class Net(nn.Module):
    """A small model that may be slow."""

    def __init__(self, sleeper: Sleeper, late: float) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Linear(64, 256), nn.Linear(256, 1)
        self.sleeper, self.late = sleeper, late

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        if self.late:
            self.sleeper.sleep(self.late)
        return self.second(self.first(x).relu()).square().mean()


def run(folder: Path, kind: str, seconds: float) -> float:
    """One rank; seconds that it really slept."""
    sleeper, rank = Sleeper(), int(os.environ["RANK"])
    late = seconds if kind == "rank" and rank == 1 else 0.0
    config = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "ledger": {"path": str(folder / "ledger")},
    }
    engine = drivetrain.initialize(model=Net(sleeper, late), config=config)[0]

    def batches() -> Iterator[torch.Tensor]:
        while True:
            sleeper.sleep(seconds if kind == "data" else 0.0)
            yield torch.ones(4, 64)

    found = batches()
    engine.train_batch(found)  # the first one sets up more
    if kind == "compile":
        compiled = []

        def backend(graph: Any, _: Any) -> Any:
            compiled.append(graph)
            sleeper.sleep(seconds if len(compiled) == 3 else 0.0)
            return graph

        engine.compile(backend=backend)
    for _ in range(STEPS - 1):
        if kind == "compile":
            torch._dynamo.reset()  # so that each step compiles again
        engine.train_batch(found)
    if kind == "disk":
        sync = os.fsync

        def throttled(file: int) -> None:
            sleeper.sleep(seconds)
            sync(file)

        engine.save_checkpoint(str(folder / "saves"), tag="plain")
        engine.train_batch(found)
        os.fsync = throttled
        engine.save_checkpoint(str(folder / "saves"), tag="throttled")
        engine.train_batch(found)
    engine.job.close()
    return sleeper.slept


def waited(columns: dict[str, float]) -> float:
    return sum(spent for name, spent in columns.items() if name.startswith("communication data"))


def main() -> None:
    errors: dict[str, float] = {}
    sums: list[float] = []

    def planted(
        kind: str, seconds: float, ranks: int = 2
    ) -> tuple[list[float], Summary, list[Step]]:
        """What each rank slept, the summary of the ledger, and the steps of rank 0."""
        own = Path(folder, kind)
        own.mkdir()
        slept = run_distributed(run, ranks, own, kind, seconds)
        attempts = read_run(own / "ledger")
        found = summary(attempts)
        sums.extend(abs(sum(each.values()) / found.wall - 1) for each in found.ranks.values())
        return slept, found, attempts[0].ranks[0].steps

    def error(name: str, column: float, slept: float) -> None:
        errors[name] = round(column / slept - 1, 4)

    with tempfile.TemporaryDirectory(prefix="drivetrain-ledger-") as folder:
        slept, found, _ = planted("data", 0.2)
        error("data", found.ranks[0]["data"], slept[0])

        slept, found, _ = planted("rank", 0.5)
        first, second = found.ranks[0], found.ranks[1]
        error("slow rank, computing", second["compute"] - first["compute"], slept[1])
        error("slow rank, waiting", waited(first) - waited(second), slept[1])

        slept, _, steps = planted("disk", 1.0, ranks=1)
        plain, throttled = (steps[STEPS + n].seconds["checkpoint"] for n in (0, 1))
        error("disk", throttled - plain, slept[0])

        slept, _, steps = planted("compile", 8.0)
        plain, long = (steps[n].seconds["compile"] for n in (2, 3))
        error("compile", long - plain, slept[0])
    shown = {
        "error": errors,
        "largest": max(abs(each) for each in errors.values()),
        "within_5_percent": sum(abs(each) <= 0.05 for each in errors.values()),
        "sum": round(max(sums), 6),
    }
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
