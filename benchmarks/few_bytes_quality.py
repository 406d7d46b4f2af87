"""Held-out loss after 1,000 steps of optimizers and compressions that send little, beside Adam's.

Two ranks train a small GPT on text of a random Markov chain of order two, so the least possible
loss is known and far from that of single tokens. Each way starts from the same weights, sees the
same data, and has a linear decay of the learning rate. With fewer words, more text and a larger
rate 1,000 steps come near that least loss, so that ways are compared where they end and not on
their way there:

    .venv/bin/python benchmarks/few_bytes_quality.py
    .venv/bin/python benchmarks/few_bytes_quality.py --words 12 --batch 16 --rate 0.005 \\
        --warm-up 100 --seeds 3 --ways Adam "1-bit Adam" "0/1 Adam"
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import torch
from drivetrain_communication.diloco.meeting_point import MeetingPoint
from drivetrain_communication.diloco.plugin import trainings

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.contracts import Purpose
from drivetrain.testing import run_distributed
from drivetrain.testing.models import TinyGPT

LENGTH = 32


@dataclass(frozen=True)
class Recipe:
    """What all ways have in common; ``seed`` is that of the first weights and of the text."""

    steps: int
    words: int
    batch: int
    rate: float
    warm_up: int
    seed: int = 0


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


def chain(words: int) -> torch.Tensor:
    """Chances [words, words, words] of the next word after two; always the same."""
    table = torch.Generator().manual_seed(1)
    return torch.softmax(2.5 * torch.randn(words, words, words, generator=table), -1)


def text(seed: int, rows: int, words: int) -> torch.Tensor:
    """Rows [rows, LENGTH + 1] of the chain."""
    chances = chain(words)
    generator = torch.Generator().manual_seed(seed)
    found = torch.randint(words, (rows, 2), generator=generator)
    for _ in range(LENGTH - 1):
        following = chances[found[:, -2], found[:, -1]]
        found = torch.cat([found, torch.multinomial(following, 1, generator=generator)], 1)
    return found


def least(rows: torch.Tensor, words: int) -> float:
    """Loss of a model that knows the chain, on all words of ``rows`` but the first two."""
    chances = chain(words)[rows[:, :-2], rows[:, 1:-1]]
    return -chances.gather(-1, rows[:, 2:, None]).log().mean().item()


def train(name: str, recipe: Recipe) -> tuple[float, float]:
    """Held-out loss, and bytes that a rank, or a replica to others, sent per step."""
    way, words, steps = WAYS[name], recipe.words, recipe.steps
    torch.manual_seed(recipe.seed)
    model = TinyGPT(words, 64, 2, positions=LENGTH)
    params = {"lr": recipe.rate, "betas": [0.9, 0.99], **way.get("params", {})}
    config: dict[str, Any] = {
        "train_micro_batch_size_per_gpu": recipe.batch,
        "gradient_clipping": 0.0,
        "optimizer": {"type": way.get("kind", "Adam"), "params": params},
        "scheduler": {
            "type": "WarmupDecayLR",
            "params": {
                "warmup_max_lr": recipe.rate,
                "warmup_num_steps": recipe.warm_up,
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
        rows = text(1000 + 100_000 * recipe.seed + 2 * step + rank, recipe.batch, words)
        engine.backward(engine(rows[:, :-1], rows[:, 1:]))
        engine.step()
    log = engine.job.byte_log
    sent = log.total(Purpose.GRADIENT).sent_bytes + log.total(Purpose.STATE).sent_bytes
    if engine in trainings:
        trainings[engine].finish()
        sent = trainings[engine].rounds.sent_bytes
    engine.states.flush()
    engine.eval()
    held = text(7, 512, words)
    with torch.no_grad():
        loss = engine(held[:, :-1], held[:, 1:]).item()
    engine.destroy()
    return loss, sent / steps


def run(name: str, recipe: Recipe) -> tuple[float, float]:
    """What rank 0, or replica 0, brings."""
    if "diloco" not in WAYS[name]:
        found: tuple[float, float] = run_distributed(train, 2, name, recipe, timeout=3000)[0]
        return found
    point = MeetingPoint("127.0.0.1", 0, [].append)
    threading.Thread(target=lambda: asyncio.run(point.serve()), daemon=True).start()

    def replica(number: int) -> tuple[float, float]:
        variables = {
            "DRIVETRAIN_REPLICA": str(number),
            "DRIVETRAIN_MEETING_POINT": f"127.0.0.1:{point.port}",
        }
        found: tuple[float, float] = run_distributed(
            train, 1, name, recipe, timeout=3000, env=variables
        )[0]
        return found

    with ThreadPoolExecutor(2) as pool:
        first, _ = pool.map(replica, range(2))
        return first


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--words", type=int, default=32)
    parser.add_argument("--batch", type=int, default=8, help="of each of two ranks")
    parser.add_argument("--rate", type=float, default=3e-3, help="learning rate")
    parser.add_argument("--warm-up", type=int, default=50, help="steps of the learning rate's")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--ways", nargs="*", default=list(WAYS), choices=list(WAYS))
    given = parser.parse_args()
    first = Recipe(given.steps, given.words, given.batch, given.rate, given.warm_up)
    rows: dict[str, dict[str, Any]] = {name: {"losses": []} for name in given.ways}
    for seed in range(given.seeds):
        for name in given.ways:
            loss, sent = run(name, replace(first, seed=seed))
            rows[name]["losses"].append(loss)
            rows[name]["sent"] = sent
            print(seed, name, loss, file=sys.stderr, flush=True)
    plain = rows[given.ways[0]]["losses"]
    for row in rows.values():
        ratios = [loss / other for loss, other in zip(row["losses"], plain, strict=True)]
        row["loss"] = sum(row["losses"]) / given.seeds
        row["loss_ratio"] = sum(ratios) / given.seeds
        row["loss_ratios"] = ratios
    lowest = least(text(7, 512, given.words), given.words)
    print(json.dumps({"steps": given.steps, "least": lowest, "ways": rows}, indent=1))


if __name__ == "__main__":
    main()
