"""Held-out loss after 1,000 steps of optimizers and compressions that send little, beside Adam's.

Two ranks train a small GPT on text of a random Markov chain of order two, so the least possible
loss is known and far from that of single tokens. Each way starts from the same weights, sees the
same data, and has a linear decay of the learning rate.

    .venv/bin/python benchmarks/few_bytes_quality.py
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from drivetrain_communication.diloco.meeting_point import MeetingPoint
from drivetrain_communication.diloco.plugin import trainings

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.contracts import Purpose
from drivetrain.testing import run_distributed
from drivetrain.testing.models import TinyGPT

WORDS, LENGTH, BATCH, RATE = 32, 32, 8, 3e-3

WAYS: dict[str, dict[str, Any]] = {
    "Adam": {},
    "1-bit Adam": {"kind": "OneBitAdam", "params": {"freeze_step": 200}},
    "0/1 Adam": {
        "kind": "ZeroOneAdam",
        "params": {"var_freeze_step": 400, "local_step_scaler": 150, "local_step_clipper": 4},
    },
    "int8 gradients": {"compress": {"method": "int8"}},
    "int4 gradients, feedback": {"compress": {"method": "int4", "error_feedback": True}},
    "PowerSGD, rank 4": {"compress": {"method": "powersgd"}},
    "DiLoCo, H = 20": {"diloco": {}},
    "DiLoCo, H = 20, int4": {"diloco": {"outer_gradients": "int4"}},
    "streaming DiLoCo, H = 20, int4": {
        "diloco": {"outer_gradients": "int4", "fragments": 2, "delay": 2}
    },
    "top 5 %": {"compress": {"method": "top_k", "density": 0.05}},
}


def text(seed: int, rows: int) -> torch.Tensor:
    """Rows [rows, LENGTH + 1] of the chain; its table is always the same."""
    table = torch.Generator().manual_seed(1)
    chances = torch.softmax(2.5 * torch.randn(WORDS, WORDS, WORDS, generator=table), -1)
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(WORDS, (rows, 2), generator=generator)
    for _ in range(LENGTH - 1):
        following = chances[found[:, -2], found[:, -1]]
        found = torch.cat([found, torch.multinomial(following, 1, generator=generator)], 1)
    return found


def train(name: str, steps: int) -> tuple[float, float]:
    """Held-out loss, and bytes that a rank, or a replica to others, sent per step."""
    way = WAYS[name]
    torch.manual_seed(0)
    model = TinyGPT(WORDS, 64, 2, positions=LENGTH)
    params = {"lr": RATE, "betas": [0.9, 0.99], **way.get("params", {})}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": BATCH,
        "gradient_clipping": 0.0,
        "optimizer": {"type": way.get("kind", "Adam"), "params": params},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_max_lr": RATE,
                "warmup_num_steps": 50,
                "warmup_type": "linear",
                "total_num_steps": steps,
            },
        },
    }
    if "compress" in way:
        config["communication"] = {"compress": {"gradients": way["compress"]}}
    if "diloco" in way:
        config["diloco"] = {"replicas": 2, "inner_steps": 20, **way["diloco"]}
    engine, *_ = drivetrain.initialize(model=model, config=config)
    rank = int(os.environ.get("DRIVETRAIN_REPLICA", Ranks.current().rank))
    for step in range(steps):
        rows = text(1000 + 2 * step + rank, BATCH)
        engine.backward(engine(rows[:, :-1], rows[:, 1:]))
        engine.step()
    log = engine.job.byte_log
    sent = log.total(Purpose.GRADIENT).sent_bytes + log.total(Purpose.STATE).sent_bytes
    if engine in trainings:
        trainings[engine].finish()
        sent = trainings[engine].rounds.sent_bytes
    engine.states.flush()
    engine.eval()
    held = text(7, 512)
    with torch.no_grad():
        loss = engine(held[:, :-1], held[:, 1:]).item()
    engine.destroy()
    return loss, sent / steps


def run(name: str, steps: int) -> tuple[float, float]:
    """What rank 0, or replica 0, brings."""
    if "diloco" not in WAYS[name]:
        found: tuple[float, float] = run_distributed(train, 2, name, steps, timeout=3000)[0]
        return found
    point = MeetingPoint("127.0.0.1", 0, [].append)
    threading.Thread(target=lambda: asyncio.run(point.serve()), daemon=True).start()

    def replica(number: int) -> tuple[float, float]:
        variables = {
            "DRIVETRAIN_REPLICA": str(number),
            "DRIVETRAIN_MEETING_POINT": f"127.0.0.1:{point.port}",
        }
        found: tuple[float, float] = run_distributed(
            train, 1, name, steps, timeout=3000, env=variables
        )[0]
        return found

    with ThreadPoolExecutor(2) as pool:
        first, _ = pool.map(replica, range(2))
        return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    given = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    for name in given.ways:
        loss, sent = run(name, given.steps)
        rows[name] = {"loss": loss, "sent": sent}
        rows[name]["loss_ratio"] = loss / rows[given.ways[0]]["loss"]
        print(name, rows[name], file=sys.stderr)
    print(json.dumps({"steps": given.steps, "ways": rows}, indent=1))


if __name__ == "__main__":
    main()
