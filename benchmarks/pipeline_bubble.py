"""Bubbles of pipelines whose stages sleep, beside those of theory and of the simulator, as JSON.

    python benchmarks/pipeline_bubble.py [--stages 4] [--micro-batches 8] [--milliseconds 80]

Each layer sleeps in its forward and twice as long in its backward, so any number of ranks fits on a
machine with few processors, and what is lost is what the runner and messages take. With gradients
of weights apart (zb_h1, zb_v) a layer has no time for those, so its backward sleeps for those of
inputs alone, and the prediction is made with W = 0. The measured bubble is the part of the time
from the first pass of any stage to the last in which a stage runs none, from the file that
``pipeline.timeline`` names; that of the step with the smallest one, as what else runs on the
machine can only add to it.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from drivetrain_pipeline.schedules import NAMES, Costs, schedule, simulate
from torch import nn

import drivetrain
from drivetrain.testing import run_distributed

WIDTH = 8


class _Sleep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor, forward: float, backward: float) -> torch.Tensor:
        ctx.seconds = backward
        time.sleep(forward)
        return x.clone()

    @staticmethod
    def backward(ctx: Any, gradient: torch.Tensor) -> Any:
        time.sleep(ctx.seconds)
        return gradient, None, None


class Sleeper(nn.Module):
    """A layer that takes its time."""

    def __init__(self, forward: float, backward: float) -> None:
        super().__init__()
        self.linear = nn.Linear(WIDTH, WIDTH)
        self.seconds = forward, backward

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        apply: Any = _Sleep.apply  # torch does not type it
        slept: torch.Tensor = apply(self.linear(x), *self.seconds)
        return slept


class Sleepers(nn.Module):
    """Layers alike, and a loss."""

    def __init__(self, layers: int, forward: float, backward: float) -> None:
        super().__init__()
        self.layers = nn.ModuleList(Sleeper(forward, backward) for _ in range(layers))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(x)
        return x.square().mean()


def run(
    name: str, stages: int, micro_batches: int, seconds: float, steps: int, folder: str
) -> float:
    """Train a pipeline that sleeps; the smallest bubble of a step, on rank 0."""
    made = schedule(name, stages, micro_batches)
    part = seconds * stages / made.chunks
    torch.manual_seed(0)
    model = Sleepers(made.chunks, part, part if made.splits_backward else 2 * part)
    file = Path(folder) / f"{name}.json"
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": micro_batches,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
        "pipeline": {"stages": stages, "schedule": name, "timeline": str(file)},
    }
    engine, *_ = drivetrain.initialize(model=model, config=config)
    found = []
    for step in range(steps + 1):
        engine.train_batch(iter([torch.ones(1, WIDTH)] * micro_batches))
        if step and engine.job.rank == 0:  # in the first one ranks connect
            found.append(bubble(file, stages))
    engine.destroy()
    return min(found, default=0.0)


def bubble(file: Path, stages: int) -> float:
    """The mean bubble of the measured step in a trace."""
    events = json.loads(file.read_text())["traceEvents"]
    spans = [(e["ts"], e["ts"] + e["dur"]) for e in events if e["ph"] == "X" and e["pid"] == 1]
    makespan = max(end for _, end in spans) - min(begin for begin, _ in spans)
    return 1 - sum(end - begin for begin, end in spans) / (stages * makespan)


def predicted(name: str, stages: int, micro_batches: int) -> float:
    """The simulator's bubble of layers that sleep."""
    made = schedule(name, stages, micro_batches)
    weights = 0.0 if made.splits_backward else 1.0
    return simulate(made, Costs.even(made.chunks, weights=weights)).mean_bubble


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0] if __doc__ else None)
    parser.add_argument("--stages", type=int, default=4)
    parser.add_argument("--micro-batches", type=int, default=8)
    parser.add_argument("--milliseconds", type=float, default=80, help="of a stage's forward")
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--schedules", nargs="+", default=list(NAMES))
    options = parser.parse_args()
    size = options.stages, options.micro_batches
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name in options.schedules:
            arguments = (name, *size, options.milliseconds / 1000, options.steps, folder)
            measured = run_distributed(run, options.stages, *arguments)[0]
            expected = predicted(name, *size)
            rows[name] = {
                "predicted": round(expected, 4),
                "measured": round(measured, 4),
                "time_ratio_to_predicted": round((1 - expected) / (1 - measured), 4),
            }
    print(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
