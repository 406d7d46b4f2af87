"""What ZeRO++ and MiCS send per step, to whom, and what quantising costs here.

python benchmarks/zero_traffic.py [--ranks 4] [--per-node 2] [--rounds 3]

A GPT of 4.2 million parameters in bf16, stage 3, two micro-batches a step, through gloo (no shared
memory). "Between nodes" counts bytes to ranks of other nodes of ``--per-node`` neighbours, as ring
algorithms send them: an all-gather or reduce-scatter of one hop over n nodes crosses nodes with
(n - 1) / n of its payload per node, an exchange with what is meant for other nodes.
"""

from __future__ import annotations

import argparse
import statistics
import time
from importlib.util import find_spec
from typing import Any

import torch

import drivetrain
from drivetrain.contracts import Axis, Purpose
from drivetrain.job.job import Job
from drivetrain.testing import run_distributed
from drivetrain.testing.models import TinyGPT

SETTINGS: dict[str, dict[str, Any]] = {
    "plain": {},
    "qwZ": {"zero_quantized_weights": True},
    "hpZ": {"zero_hpz_partition_size": "node"},
    "qgZ, one hop": {"zero_quantized_gradients": True, "zero_ranks_per_node": "world"},
    "qgZ, two hops": {"zero_quantized_gradients": True, "zero_ranks_per_node": "node"},
    "qgZ with LoCo": {
        "zero_quantized_gradients": True,
        "zero_ranks_per_node": "node",
        "zeropp_loco_param": {},
    },
    "all": {
        "zero_quantized_weights": True,
        "zero_hpz_partition_size": "node",
        "zero_quantized_gradients": True,
        "zero_ranks_per_node": "node",
    },
    "MiCS": {"mics_shard_size": "node"},
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--per-node", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    answers: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
    for _ in range(options.rounds):
        for name, keys in SETTINGS.items():
            sizes = {"node": options.per_node, "world": options.ranks}
            zero = {k: sizes.get(v, v) if isinstance(v, str) else v for k, v in keys.items()}
            ranks = run_distributed(one_job, options.ranks, zero, options.per_node, timeout=600)
            answers[name].append({key: max(r[key] for r in ranks) for key in ranks[0]})
    columns = list(answers["plain"][0])
    print("| | " + " | ".join(columns) + " |")
    print("|---" * (len(columns) + 1) + "|")
    for name, runs in answers.items():
        cells = [f"{statistics.median(run[key] for run in runs):.2f}" for key in columns]
        print(f"| {name} | " + " | ".join(cells) + " |")


def one_job(zero: dict[str, Any], per_node: int) -> dict[str, float]:
    torch.manual_seed(0)
    module = TinyGPT(2048, 256, 4, positions=128)
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0, **zero},
    }
    if find_spec("drivetrain_cpu"):
        config["cpu"] = {"shared_memory": False}
    engine = drivetrain.initialize(
        model=module, model_parameters=list(module.parameters()), config=config
    )[0]
    job, tokens = engine.job, torch.randint(2048, (2, 129))
    seconds = []
    for step in range(4):
        if step == 3:
            job.byte_log.reset()
        started = time.process_time()
        for _ in range(2):
            engine.backward(engine(tokens[:, :-1], tokens[:, 1:]))
            engine.step()
        seconds.append(time.process_time() - started)
    row = {"weights, MB": 0.0, "gradients, MB": 0.0, "between nodes, MB": 0.0}
    for call, traffic in job.byte_log.items():
        if call.purpose not in (Purpose.WEIGHT, Purpose.GRADIENT):
            continue
        name = "weights, MB" if call.purpose is Purpose.WEIGHT else "gradients, MB"
        row[name] += traffic.sent_bytes / 1e6
        row["between nodes, MB"] += crossing(job, call.axis, call.op, per_node) * (
            traffic.payload_bytes / 1e6
        )
    row["processor s/step"] = statistics.median(seconds[1:])
    job.close()
    return row


def crossing(job: Job, axis: Axis, op: str, per_node: int) -> float:
    """Share of a collective's payload that each rank, on average, sends to other nodes."""
    ranks = job.mesh.ranks(axis)
    nodes = len({rank // per_node for rank in ranks})
    if op == "all_to_all":
        same = sum(rank // per_node == job.rank // per_node for rank in ranks)
        return (len(ranks) - same) / len(ranks)
    # A ring crosses nodes once per node; over all its ranks that is nodes / ranks of its steps.
    turns = 2 if op == "all_reduce" else 1
    ring = turns * (len(ranks) - 1) / len(ranks)
    return ring * nodes / len(ranks) if nodes > 1 else 0.0


if __name__ == "__main__":
    main()
