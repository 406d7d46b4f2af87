"""Plans beside what jobs then do: peak memory, processor time of a step, and their ranking.

Usage: plan.py [--only N] [--limit] RESULTS.json

24 configurations of ZeRO stage, place of states, precision, accumulation, recomputation and model
run as one rank of one thread. Memory is the resident set, less that after a training of no size.
Times are of the processor, for the machine may be shared. With --limit each plan's memory is also
the most that the process may map (RLIMIT_DATA) beside what it has, and it must not run out.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import plan_models
import torch
from drivetrain_cli.memory import Ranks
from drivetrain_cli.planning.machine_table import MachineTable
from drivetrain_cli.planning.measuring import measure_machine, time_operators
from drivetrain_cli.planning.overhead import overhead_of
from drivetrain_cli.planning.price import price_of
from drivetrain_cli.planning.rehearsed import rehearse
from drivetrain_cli.planning.subject import Subject
from drivetrain_cli.stand_in import without_memory

from drivetrain.job.accelerator_choice import choose_accelerator

SEQUENCE, STEPS = 128, 4

CASES = [
    (stage, away, precision, steps, again, model)
    for number, (stage, away, precision, model) in enumerate(
        [
            *(
                (stage, False, p, m)
                for stage in range(4)
                for p in ("fp32", "bf16")
                for m in ("gpt", "wide")
            ),
            *(
                (stage, True, p, m)
                for stage in (2, 3)
                for p in ("fp32", "bf16")
                for m in ("gpt", "wide")
            ),
        ]
    )
    for steps, again in [[(1, False), (2, True), (2, False), (1, True)][number % 4]]
]


def config(case: tuple[Any, ...]) -> dict[str, Any]:
    stage, away, precision, steps, again, _ = case
    zero: dict[str, Any] = {"stage": stage}
    if away:
        zero["offload_optimizer"] = {"device": "cpu"}
    return {
        "train_micro_batch_size_per_gpu": 4,
        "gradient_accumulation_steps": steps,
        "optimizer": {"type": "AdamW"},
        "bf16": {"enabled": precision == "bf16"},
        "zero_optimization": zero,
        **({"activation_checkpointing": {"recompute": "all"}} if again else {}),
    }


def worked(given: dict[str, Any], model: str, limit: int | None) -> dict[str, Any]:
    """What the worker measures; ``None`` in ``peak`` where it ran out of memory."""
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.json")
        file.write_text(json.dumps(given))
        worker = str(Path(__file__).with_name("plan_worker.py"))
        command = [sys.executable, worker, str(file), model, str(SEQUENCE), str(STEPS), folder]
        command += [] if limit is None else [str(limit)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            return {"peak": None, "error": done.stderr[-400:]}
        return json.loads(Path(folder, "rank0.json").read_text())


def one(case: tuple[Any, ...], table: MachineTable, limits: bool) -> dict[str, Any]:
    given, model = config(case), case[-1]
    make = getattr(plan_models, model)
    subject = Subject(lambda: without_memory(make, model), model, SEQUENCE, None, [])
    begin = time.process_time()
    found = rehearse(given, subject, Ranks(1, 1, True))
    planning = time.process_time() - begin
    missing = [o for o in found.operators.found.values() if o.signature not in table.operators]
    accelerator = choose_accelerator()
    table.operators |= time_operators(missing, accelerator, 0.03, now=time.process_time)
    price = price_of(found, table, on_cpu=True)
    measured = worked(given, model, None)
    if measured["peak"] is None:
        raise SystemExit(f"{case}: {measured['error']}")
    row = {
        "case": case,
        "planned_bytes": found.needs,
        "measured_bytes": measured["peak"],
        "memory": found.needs / measured["peak"],
        "planned_seconds": price.seconds,
        "measured_seconds": statistics.median(measured["cpu"][1:]),
        "planning_seconds": planning,
    }
    row["time"] = row["planned_seconds"] / row["measured_seconds"]
    if limits:
        row["runs_within"] = worked(given, model, found.needs)["peak"] is not None
    print(json.dumps(row), flush=True)
    return row


def kendall(rows: list[dict[str, Any]]) -> float:
    """Kendall's tau of planned and measured times; pairs within 2 % of each other do not count."""
    agree = count = 0
    for one_, other in combinations(rows, 2):
        real = one_["measured_seconds"] - other["measured_seconds"]
        if abs(real) > 0.02 * one_["measured_seconds"]:
            planned = one_["planned_seconds"] - other["planned_seconds"]
            agree += 1 if real * planned > 0 else -1
            count += 1
    return agree / max(1, count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", type=int, default=len(CASES))
    parser.add_argument("--limit", action="store_true")
    parser.add_argument("results", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    accelerator = choose_accelerator()
    table = measure_machine(accelerator, 0.02)
    table.overhead = overhead_of(accelerator, 0.02)
    step = max(1, len(CASES) // options.only)
    rows = [one(case, table, options.limit) for case in CASES[::step][: options.only]]
    summary = {
        "configurations": len(rows),
        "memory_within_10_percent": sum(abs(r["memory"] - 1) <= 0.1 for r in rows),
        "memory_worst": max((r["memory"] for r in rows), key=lambda ratio: abs(ratio - 1)),
        "time_within_20_percent": sum(abs(r["time"] - 1) <= 0.2 for r in rows),
        "time_worst": max((r["time"] for r in rows), key=lambda ratio: abs(ratio - 1)),
        "kendall_tau": kendall(rows),
        "ran_out": sum(not r.get("runs_within", True) for r in rows),
    }
    options.results.write_text(json.dumps({"summary": summary, "rows": rows}, indent=1))
    print(json.dumps(summary, indent=1))


if __name__ == "__main__":
    main()
