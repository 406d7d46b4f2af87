"""Held-out loss after 1,000 steps of optimizers and compressions that send little, beside Adam's.

Two ranks train a small GPT on text of a random Markov chain of order two, so the least possible
loss is known and far from that of single tokens. Each way starts from the same weights, sees the
same data, and has a linear decay of the learning rate.

    .venv/bin/python benchmarks/few_bytes_quality.py
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

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
    """Held-out loss, and bytes that a rank sent per step."""
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
    engine, *_ = drivetrain.initialize(model=model, config=config)
    rank = Ranks.current().rank
    for step in range(steps):
        rows = text(1000 + 2 * step + rank, BATCH)
        engine.backward(engine(rows[:, :-1], rows[:, 1:]))
        engine.step()
    log = engine.job.byte_log
    sent = log.total(Purpose.GRADIENT).sent_bytes + log.total(Purpose.STATE).sent_bytes
    engine.states.flush()
    engine.eval()
    held = text(7, 512)
    with torch.no_grad():
        loss = engine(held[:, :-1], held[:, 1:]).item()
    engine.destroy()
    return loss, sent / steps


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    given = parser.parse_args()
    rows: dict[str, dict[str, float]] = {}
    for name in given.ways:
        loss, sent = run_distributed(train, 2, name, given.steps, timeout=3000)[0]
        rows[name] = {"loss": loss, "sent": sent}
        rows[name]["loss_ratio"] = loss / rows[given.ways[0]]["loss"]
        print(name, rows[name], file=sys.stderr)
    print(json.dumps({"steps": given.steps, "ways": rows}, indent=1))


if __name__ == "__main__":
    main()
