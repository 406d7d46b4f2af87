"""Measure what a run's ledger costs on two ranks of one CPU thread each, as JSON.

    python benchmarks/ledger.py

A GPT of eight blocks and 6.5 million parameters, 1,024 tokens a step on each rank, at ZeRO's third
stage. Two engines, one with a ledger and one without, take turns in the same processes.
``processor`` is the processor time of a step with a ledger as a part of one without, the median
over pairs. A busy machine disturbs that more than the difference is, so the ledger's work is also
timed by itself: ``marks`` of a step, ``microseconds`` for each, and those of the ``line`` that ends
a step, in processor time; ``share`` is their sum as a part of a step by the clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from typing import Any

import torch

import drivetrain
from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed
from drivetrain.testing.models import TinyGPT

TOKENS = (4, 256)
WARM = 3
CALLS = 2_000


def main() -> None:
    """Print the figures of rank 0."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--pairs", type=int, default=10)
    with tempfile.TemporaryDirectory(prefix="drivetrain-ledger-") as folder:
        found = run_distributed(measured, 2, folder, parser.parse_args().pairs)[0]
    print(json.dumps({"ledger": found}, indent=2))


def measured(folder: str, pairs: int) -> dict[str, float]:
    """What one rank sees."""
    kept, plain = start({"path": folder}), start({"enabled": False, "path": folder})
    for engine in (kept, plain) * WARM:
        step(engine)
    found = [(step(kept), step(plain)) for _ in range(pairs)]
    milliseconds = 1000 * statistics.median(clock for _, (clock, _) in found)
    timeline = kept.job.ledger._timeline  # type: ignore[attr-defined]
    timeline.cut()
    step_without_line(kept)
    marks = len(timeline.cut().changes)
    each, line = per_mark(timeline), per_line(kept, marks)
    answer = {
        "processor": round(statistics.median(a[1] / b[1] for a, b in found), 4),
        "milliseconds of a step": round(milliseconds, 1),
        "marks": marks,
        "microseconds": round(each, 2),
        "line": round(line, 1),
        "share": round((marks * each + line) / 1000 / milliseconds, 5),
    }
    for engine in (kept, plain):
        engine.destroy()
        engine.job.close()
    return answer


def start(section: dict[str, Any]) -> Engine:
    """An engine on this rank."""
    torch.manual_seed(0)
    config = {
        "train_micro_batch_size_per_gpu": TOKENS[0],
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 3},
        "ledger": section,
    }
    return drivetrain.initialize(model=TinyGPT(512, 256, 8, positions=TOKENS[1]), config=config)[0]


def step(engine: Engine) -> tuple[float, float]:
    """Seconds by the clock, and of processor time, of one step."""
    ids = torch.randint(512, TOKENS)
    began, worked = time.perf_counter(), time.process_time()
    engine.backward(engine(ids, ids))
    engine.step()
    return time.perf_counter() - began, time.process_time() - worked


def step_without_line(engine: Engine) -> None:
    """Everything of a step but its update, at which the timeline is cut."""
    ids = torch.randint(512, TOKENS)
    engine.backward(engine(ids, ids))
    engine.states.finish_reduction()
    engine.states.discard_gradients()


def per_mark(timeline: Any) -> float:
    """Microseconds of processor time for one change of columns."""
    began = time.thread_time()
    for _ in range(CALLS):
        assert timeline.is_here
        timeline.enter("compute", "bench")
        timeline.leave()
    spent = time.thread_time() - began
    timeline.cut()
    return 1e6 * spent / CALLS / 2


def per_line(engine: Engine, marks: int) -> float:
    """Microseconds of processor time for the line of a step with so many marks."""
    from drivetrain_profiler.ledger.plugin import _recorders

    recorder = _recorders[engine.job][0]
    seconds = []
    for _ in range(50):
        for _ in range(marks // 2):
            recorder.timeline.enter("compute", "bench")
            recorder.timeline.leave()
        began = time.thread_time()
        recorder.step(engine)
        seconds.append(time.thread_time() - began)
    return 1e6 * statistics.median(seconds)


if __name__ == "__main__":
    main()
