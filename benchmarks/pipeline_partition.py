"""The step of a pipeline that is cut by measured times, beside that of every other cut, as JSON.

    python benchmarks/pipeline_partition.py [--steps 3]

Layers sleep, each for another time, twice as long in backward, so ranks need no processors of their
own. `drivetrain_pipeline.measure` times them in a model that is cut evenly; then the model is cut
by these times, and into every sequence of parts that there is. A step's time is the least of
several, as what else runs on a machine can only add to it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from itertools import combinations, pairwise
from pathlib import Path
from typing import Any

import torch
from pipeline_bubble import WIDTH, Sleeper
from torch import nn

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed

MILLISECONDS = (30, 10, 40, 20, 15, 60, 25)
"""Of each layer's forward; no two are alike, and equal numbers of layers are no good cut."""
STAGES, MICRO_BATCHES = 3, 6


class Uneven(nn.Module):
    """Layers of other times, and a loss."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Sleeper(ms / 1000, 2 * ms / 1000) for ms in MILLISECONDS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def engine_of(pipeline: dict[str, Any]) -> Engine:
    torch.manual_seed(0)
    engine, *_ = drivetrain.initialize(
        model=Uneven(),
        config={
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": MICRO_BATCHES,
            "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
            "pipeline": {"stages": STAGES, **pipeline},
        },
    )
    return engine


def batches() -> Iterator[torch.Tensor]:
    while True:
        yield torch.ones(1, WIDTH)


def step_of(pipeline: dict[str, Any], steps: int) -> float:
    """The least seconds of a step."""
    engine, taken = engine_of(pipeline), []
    for _ in range(steps + 1):
        begin = time.perf_counter()
        engine.train_batch(batches())
        taken.append(time.perf_counter() - begin)
    engine.destroy()
    return min(taken[1:])  # the first one learns shapes


def cuts() -> list[tuple[int, ...]]:
    """All sequences of parts: the first layer of each, and the number of layers."""
    layers = len(MILLISECONDS)
    return [(0, *inner, layers) for inner in combinations(range(1, layers), STAGES - 1)]


def force(path: Path, bounds: Sequence[int]) -> None:
    """Write times that make all parts equal, if a model is cut at ``bounds``."""
    layers = {}
    for begin, end in pairwise(bounds):
        for number in range(begin, end):
            forward = 1 / (end - begin)
            layers[f"layers.{number}"] = {"forward": forward, "backward": 0, "activations": 0}
    path.write_text(json.dumps(layers))


def name_of(bounds: Sequence[int]) -> str:
    return "-".join(map(str, bounds))


def run(folder: str, steps: int) -> dict[str, Any]:
    """What rank 0 has found, with the files of all cuts in ``folder``."""
    from drivetrain_pipeline import measure

    engine = engine_of({"partition": "uniform"})
    found = Path(folder) / "measured.json"
    measure(engine, batches(), found, steps=3)
    engine.destroy()
    measured = step_of({"partition": "measured", "measured": str(found)}, steps)
    every = {}
    for name in map(name_of, cuts()):
        section = {"partition": "measured", "measured": str(Path(folder) / name)}
        every[name] = round(step_of(section, steps), 4)
    best = min(every, key=lambda name: every[name])
    return {
        "measured": {"seconds": round(measured, 4)},
        "best": {"cut": best, "seconds": every[best]},
        "worst": {"seconds": max(every.values())},
        "measured to best": {"ratio": round(measured / every[best], 4)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=3)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        for bounds in cuts():
            force(Path(folder) / name_of(bounds), bounds)
        print(
            json.dumps(
                run_distributed(run, STAGES, folder, options.steps, timeout=500)[0], indent=1
            )
        )


if __name__ == "__main__":
    main()
