"""Measure what the watchdog costs on two ranks of one CPU thread each, as JSON.

    python benchmarks/watchdog.py

A GPT of eight blocks and 6.5 million parameters, 1,024 tokens a step on each rank. Two engines, one
watched and one not, take turns in the same processes. ``time`` and ``processor`` are the watched
engine's step as a part of the other's, the medians over pairs; ``processor`` is the processor time
of all threads, which a busy machine disturbs less. ``thread`` is what the watchdog's own thread
takes of a processor. ``microseconds`` is what one collective costs more, of the calling thread's
processor time.
"""

from __future__ import annotations

import argparse
import json
import statistics
import threading
import time
from pathlib import Path
from typing import Any

import torch

import drivetrain
from drivetrain.contracts import DONE, Collective, Kind, Purpose, Tag
from drivetrain.contracts.world.communicator import CommunicatorWrapper
from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed
from drivetrain.testing.models import TinyGPT

TOKENS = (4, 256)
WARM = 3
CALLS = 20_000


def main() -> None:
    """Print the figures of each ZeRO stage."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=15)
    pairs = parser.parse_args().pairs
    stages = {
        f"stage {stage}": run_distributed(measured, 2, stage, pairs)[0] for stage in (0, 2, 3)
    }
    print(json.dumps({"systems": stages}, indent=2))


def measured(stage: int, pairs: int) -> dict[str, float]:
    """What one rank sees."""
    watched, plain = start(stage, enabled=True), start(stage, enabled=False)
    for engine in (watched, plain) * WARM:
        step(engine)
    before, began = thread_seconds(), time.monotonic()
    found = [(step(watched), step(plain)) for _ in range(pairs)]
    thread = (thread_seconds() - before) / (time.monotonic() - began)
    times, processors = zip(*[(a[0] / b[0], a[1] / b[1]) for a, b in found], strict=True)
    answer = {
        "time": round(statistics.median(times), 4),
        "processor": round(statistics.median(processors), 4),
        "thread": round(thread, 5),
        "milliseconds of a step": round(1000 * statistics.median(b[0] for _, b in found), 1),
        "collectives of a step": collectives(watched),
        "microseconds": round(per_collective(watched), 2),
    }
    for engine in (watched, plain):
        engine.destroy()
        engine.job.close()
    return answer


def start(stage: int, *, enabled: bool) -> Engine:
    """An engine on this rank."""
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": TOKENS[0],
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": stage},
        "communication": {"watchdog": {"enabled": enabled}},
    }
    model = TinyGPT(512, 256, 8, positions=TOKENS[1])
    return drivetrain.initialize(model=model, config=config)[0]


def step(engine: Engine) -> tuple[float, float]:
    """Seconds by the clock, and of processor time, of one step."""
    ids = torch.randint(512, TOKENS)
    began, worked = time.perf_counter(), time.process_time()
    engine.backward(engine(ids, ids))
    engine.step()
    return time.perf_counter() - began, time.process_time() - worked


def thread_seconds() -> float:
    """Processor time of the watchdog's thread so far."""
    found = [t for t in threading.enumerate() if t.name == "drivetrain-watchdog"]
    text = Path(f"/proc/self/task/{found[0].native_id}/schedstat").read_text("utf-8")
    return int(text.split()[0]) / 1e9


def collectives(engine: Engine) -> int:
    """How many a step issues."""
    log = engine.job.byte_log
    log.reset()
    step(engine)
    return log.total().calls


class _Nothing(CommunicatorWrapper):
    """Carries nothing, so that what is left is the cost of the layers outside."""

    def run(self, collective: Collective) -> Any:
        return DONE


def per_collective(engine: Engine) -> float:
    """Microseconds of the calling thread that the layer adds to one collective."""
    layer: Any = engine.job.communicator
    inner, layer.inner = layer.inner, _Nothing(layer.inner)
    tensor, tag = torch.ones(4), Tag(Purpose.GRADIENT, "bench", "bench")
    collective = Collective(Kind.ALL_REDUCE, (tensor,), "data", tag)
    seconds = []
    for target in (layer, layer.inner):
        began = time.thread_time()
        for _ in range(CALLS):
            target.run(collective)
        seconds.append(time.thread_time() - began)
    layer.inner = inner
    return 1e6 * (seconds[0] - seconds[1]) / CALLS


if __name__ == "__main__":
    main()
