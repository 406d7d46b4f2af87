"""Plans beside what jobs then do: peak memory, processor time of a step, and their ranking.

Usage: plan.py memory|others|ranks|stages|time|clock|thousand [--results FILE] [--seconds N]
               [--only N]

Prints JSON. ``memory``: 24 configurations of ZeRO stage, place of states, precision, accumulation,
recomputation and model, as one rank of one thread. Memory is the resident set, less that after a
training of no size. What the plan needs is also the most that the process may map (RLIMIT_DATA)
beside what it has, and it must not run out. ``others``: the same of 12 configurations of other
models, to which nothing was fitted. ``ranks``: the same on two ranks, of whose resident set the
other one's part of what they share is taken away. ``stages``: the same of pipelines of two stages,
each beside its own plan. ``time``: processor seconds of a step of the 24,
for the machine may be shared. ``clock``: seconds of a step of the same pipelines, whose stages
wait for each other, which needs a machine that does nothing else.
``thousand``: how long it takes to plan 1.3 billion parameters on 1,024 ranks.

With --results what is measured is kept in a file, and what is there is not measured again. After
--seconds nothing is begun any more, so that a long measurement can be made in slices.
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
from collections.abc import Callable
from itertools import combinations
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))

import plan_models
import torch
from drivetrain_cli.memory import Ranks
from drivetrain_cli.planning.machine_table import MachineTable
from drivetrain_cli.planning.measuring import (
    measure_collectives,
    measure_machine,
    time_operators,
)
from drivetrain_cli.planning.overhead import overhead_of
from drivetrain_cli.planning.price import price_of
from drivetrain_cli.planning.rehearsed import Rehearsed, rehearse
from drivetrain_cli.planning.subject import Subject
from drivetrain_cli.planning.verdict import Question, answer
from drivetrain_cli.stand_in import without_memory

from drivetrain.job.accelerator_choice import choose_accelerator

SEQUENCE, STEPS = 128, 4
PARTS = ("memory", "others", "ranks", "stages", "time", "clock", "thousand")
TIMES = ("time", "clock")
RAN_OUT = ("memory", "could not create a primitive")
"""What torch, and what oneDNN says that gets no pages for its code."""

WAYS = [(1, False), (2, True), (2, False), (1, True)]
"""Micro-batches of a window, and whether all blocks are recomputed."""

ROWS = [
    *(
        (stage, False, p, m)
        for stage in range(4)
        for p in ("fp32", "bf16")
        for m in ("gpt", "wide")
    ),
    *((stage, True, p, m) for stage in (2, 3) for p in ("fp32", "bf16") for m in ("gpt", "wide")),
]
CASES = {
    f"stage {stage}, {'offload, ' if away else ''}{precision}, {steps} micro-batch"
    f"{'es' if steps > 1 else ''}{', recompute' if again else ''}, {model}": (
        {
            "train_micro_batch_size_per_gpu": 4,
            "gradient_accumulation_steps": steps,
            "optimizer": {"type": "AdamW"},
            "bf16": {"enabled": precision == "bf16"},
            "zero_optimization": {"stage": stage}
            | ({"offload_optimizer": {"device": "cpu"}} if away else {}),
            **({"activation_checkpointing": {"recompute": "all"}} if again else {}),
        },
        model,
        1,
    )
    for number, (stage, away, precision, model) in enumerate(ROWS)
    for steps, again in [WAYS[number % 4]]
}
"""Name -> config, model and ranks."""

KEPT_BACK = [
    ("deep", 0, False, "fp32", 8, 1, False),
    ("deep", 3, False, "bf16", 2, 2, True),
    ("deep", 2, True, "fp32", 5, 2, True),
    ("middling", 1, False, "fp32", 16, 1, False),
    ("middling", 2, True, "bf16", 6, 3, False),
    ("middling", 2, False, "fp32", 24, 1, True),
    ("broad", 0, False, "bf16", 1, 1, False),
    ("broad", 3, True, "fp32", 2, 1, True),
    ("encoder", 0, False, "fp32", 8, 1, False),
    ("encoder", 2, False, "bf16", 4, 2, False),
    ("encoder", 1, False, "fp32", 12, 1, True),
    ("encoder", 3, True, "bf16", 3, 1, True),
    ("deep", 1, False, "bf16", 3, 2, True),
    ("deep", 3, False, "fp32", 1, 3, True),
    ("deep", 2, False, "bf16", 12, 1, False),
    ("middling", 0, False, "fp32", 3, 2, True),
    ("middling", 3, True, "bf16", 10, 1, True),
    ("broad", 2, False, "bf16", 3, 2, False),
    ("encoder", 0, False, "bf16", 2, 1, True),
    ("encoder", 3, False, "fp32", 6, 2, False),
]
"""How the heap is played back was fitted to none of these, and how much stays free to the first 12:
model, stage, offload, precision, samples, micro-batches of a window, recompute."""

OTHERS: dict[str, tuple[dict[str, Any], str, int]] = {
    f"{model}, stage {stage}, {'offload, ' if away else ''}{precision}, {steps} x {samples}"
    f"{', recompute' if again else ''}": (
        {
            "train_micro_batch_size_per_gpu": samples,
            "gradient_accumulation_steps": steps,
            "optimizer": {"type": "AdamW"},
            "bf16": {"enabled": precision == "bf16"},
            "zero_optimization": {"stage": stage}
            | ({"offload_optimizer": {"device": "cpu"}} if away else {}),
            **({"activation_checkpointing": {"recompute": "all"}} if again else {}),
        },
        model,
        1,
    )
    for model, stage, away, precision, samples, steps, again in KEPT_BACK
}

PLAIN: dict[str, Any] = {"train_micro_batch_size_per_gpu": 4, "optimizer": {"type": "AdamW"}}
BF16: dict[str, Any] = {"bf16": {"enabled": True}}
ON_RANKS: dict[str, tuple[dict[str, Any], str, int]] = {
    **{
        f"stage {stage}, {precision}, {model}, 2 ranks": (
            {**PLAIN, **more, "zero_optimization": {"stage": stage}},
            model,
            2,
        )
        for stage in range(4)
        for precision, more, model in (("fp32", {}, "gpt"), ("bf16", BF16, "wide"))
    },
    **{
        f"stage {stage}, fp32, gpt, 2 ranks, gloo": (
            {**PLAIN, "zero_optimization": {"stage": stage}, "cpu": {"shared_memory": False}},
            "gpt",
            2,
        )
        for stage in range(4)
    },
}

ON_STAGES: dict[str, tuple[dict[str, Any], str, int]] = {
    f"{schedule}, stage {stage}, {precision}, {model}, {steps} micro-batches": (
        {
            **PLAIN,
            **(BF16 if precision == "bf16" else {}),
            "gradient_accumulation_steps": steps,
            "zero_optimization": {"stage": stage},
            "pipeline": {"stages": 2, "schedule": schedule},
        },
        model,
        2,
    )
    for schedule, stage, precision, model, steps in (
        ("1f1b", 0, "fp32", "gpt", 4),
        ("1f1b", 1, "bf16", "deep", 8),
        ("gpipe", 0, "fp32", "deep", 4),
        ("interleaved", 1, "fp32", "gpt", 4),
        ("zb_h1", 0, "fp32", "gpt", 4),
        ("zb_v", 0, "bf16", "middling", 6),
    )
}


def subject_of(model: str) -> Subject:
    make = getattr(plan_models, model)
    return Subject(lambda: without_memory(make, model), model, SEQUENCE, None, [])


def planned(given: dict[str, Any], model: str, ranks: int) -> Rehearsed:
    """One rank of a job."""
    return rehearse(given, subject_of(model), Ranks(ranks, 1, True))


def stages_of(given: dict[str, Any], model: str, ranks: int) -> dict[str, Any]:
    """Each stage's plan and its peak, as the one that is farthest from its plan has them."""
    question = Question(given, subject_of(model), Ranks(ranks, 1, True), ranks, None, None, False)
    found = answer(question)
    within = worked(given, model, ranks, 3, found.needs)
    ran = within or worked(given, model, ranks, 3)
    rows = [
        {
            "planned_bytes": plan.reserved,
            "limit_bytes": plan.needs,
            "measured_bytes": each["peak"],
            "resident_bytes": each["resident"],
            "ratio": plan.reserved / each["peak"],
            "limit_ratio": plan.needs / each["peak"],
            "ran_out": not within,
        }
        for plan, each in zip(found.ranks, ran, strict=True)
    ]
    return max(rows, key=lambda row: abs(row["ratio"] - 1))


def worked(
    given: dict[str, Any], model: str, ranks: int, steps: int, limit: int | None = None
) -> list[dict[str, Any]]:
    """What the worker measures on each rank; empty if one ran out of memory.

    Raises:
        SystemExit: it failed for another reason.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder, "config.json")
        file.write_text(json.dumps(given))
        worker = str(Path(__file__).with_name("plan_worker.py"))
        launcher = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={ranks}"]
        command = [sys.executable, *(launcher if ranks > 1 else []), worker, str(file), model]
        command += [str(SEQUENCE), str(steps), folder] + ([] if limit is None else [str(limit)])
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            if limit is not None and any(word in done.stderr.lower() for word in RAN_OUT):
                return []
            raise SystemExit(f"{given}: {done.stderr[-2000:]}")
        files = [Path(folder, f"rank{rank}.json") for rank in range(ranks)]
        return [json.loads(file.read_text()) for file in files]


def memory_of(given: dict[str, Any], model: str, ranks: int) -> dict[str, Any]:
    found = planned(given, model, ranks)
    within = worked(given, model, ranks, 3, found.needs)
    ran = within or worked(given, model, ranks, 3)
    peaks = [each["peak"] for each in ran]
    return {
        "in_use_bytes": found.in_use,
        "planned_bytes": found.reserved,
        "limit_bytes": found.needs,
        "measured_bytes": max(peaks),
        "resident_bytes": max(each["resident"] for each in ran),
        "ratio": found.reserved / max(peaks),
        "limit_ratio": found.needs / max(peaks),
        "ran_out": not within,
    }


def time_of(given: dict[str, Any], model: str, ranks: int, table: MachineTable) -> dict[str, Any]:
    begin = time.process_time()
    found = planned(given, model, ranks)
    planning = time.process_time() - begin
    missing = [o for o in found.operators.found.values() if o.signature not in table.operators]
    accelerator = choose_accelerator()
    table.operators |= time_operators(missing, accelerator, 0.03, now=time.process_time)
    price = price_of(found, table, on_cpu=True)
    (measured,) = worked(given, model, ranks, STEPS)
    seconds = statistics.median(measured["cpu"][1:])
    return {
        "planned_seconds": price.seconds,
        "measured_seconds": seconds,
        "planning_seconds": planning,
        "ratio": price.seconds / seconds,
    }


def clock_of(given: dict[str, Any], model: str, ranks: int, table: MachineTable) -> dict[str, Any]:
    """A pipeline's step by the clock, of the stage that takes longest, and by its plan."""

    def add_times(table: MachineTable, found: Rehearsed) -> None:
        missing = [o for o in found.operators.found.values() if o.signature not in table.operators]
        table.operators |= time_operators(missing, choose_accelerator(), 0.03)

    question = Question(given, subject_of(model), Ranks(ranks, 1, True), ranks, None, table, False)
    price = answer(question, add_times).price
    assert price is not None
    ran = worked(given, model, ranks, STEPS + 1)
    seconds = max(statistics.median(each["wall"][1:]) for each in ran)
    return {
        "planned_seconds": price.seconds,
        "waiting_seconds": price.bubble,
        "measured_seconds": seconds,
        "ratio": price.seconds / seconds,
    }


def timing(part: str) -> Callable[..., dict[str, Any]]:
    """What measures a case of a part of times, with a table of this machine."""
    accelerator = choose_accelerator()
    table = measure_machine(accelerator, 0.02)
    table.overhead = overhead_of(accelerator, 0.02)
    table.collectives = measure_collectives(2) if part == "clock" else {}
    of = {"clock": clock_of, "time": time_of}[part]
    return lambda *case: of(*case, table)


def kendall(rows: list[dict[str, Any]]) -> float:
    """Kendall's tau of planned and measured times; pairs within 2 % of each other do not count."""
    agree = count = 0
    for one_, other in combinations(rows, 2):
        real = one_["measured_seconds"] - other["measured_seconds"]
        if abs(real) > 0.02 * one_["measured_seconds"]:
            planned_ = one_["planned_seconds"] - other["planned_seconds"]
            agree += 1 if real * planned_ > 0 else -1
            count += 1
    return agree / max(1, count)


def worst(ratios: list[float]) -> float:
    return max(ratios, key=lambda ratio: abs(ratio - 1))


def summary_of(part: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    ratios = [row["ratio"] for row in rows]
    if part in TIMES:
        return {
            "configurations": len(rows),
            "time_within_20_percent": sum(abs(ratio - 1) <= 0.2 for ratio in ratios),
            "time_worst": worst(ratios),
            "kendall_tau": kendall(rows),
        }
    return {
        "configurations": len(rows),
        "memory_within_10_percent": sum(abs(ratio - 1) <= 0.1 for ratio in ratios),
        "memory_worst": worst(ratios),
        "limit_largest": max(row["limit_ratio"] for row in rows),
        "ran_within_the_limit": sum(not row["ran_out"] for row in rows),
    }


def thousand() -> dict[str, Any]:
    """Wall seconds to plan a large job on many ranks, in a process that has loaded all it needs."""
    given = {
        "train_micro_batch_size_per_gpu": 4,
        "optimizer": {"type": "AdamW"},
        "bf16": {"enabled": True},
        "zero_optimization": {"stage": 3},
    }
    begin = time.perf_counter()
    found = rehearse(given, subject_of("billion"), Ranks(8, 128, False))
    taken = time.perf_counter() - begin
    return {"parameters": found.parameters, "ranks": 1024, "seconds": taken}


def measured(options: argparse.Namespace) -> dict[str, Any]:
    """Rows of a part by name, as far as time allows."""
    begin = time.monotonic()
    kept: Path | None = options.results
    rows: dict[str, Any] = json.loads(kept.read_text()) if kept and kept.exists() else {}
    parts = {"ranks": ON_RANKS, "others": OTHERS, "stages": ON_STAGES, "clock": ON_STAGES}
    cases = parts.get(options.part, CASES)
    step = max(1, len(cases) // options.only)
    wanted = dict(list(cases.items())[::step][: options.only])
    run: Callable[..., dict[str, Any]] | None = None if options.part in TIMES else memory_of
    run = stages_of if options.part == "stages" else run
    for name, case in wanted.items():
        if name in rows:
            continue
        if options.seconds and time.monotonic() - begin > options.seconds:
            break
        run = run or timing(options.part)
        rows[name] = run(*case)
        print(name, json.dumps(rows[name]), file=sys.stderr, flush=True)
        if kept:
            kept.write_text(json.dumps(rows, indent=1))
    return {name: rows[name] for name in wanted if name in rows}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=PARTS)
    parser.add_argument("--results", type=Path)
    parser.add_argument("--seconds", type=float)
    parser.add_argument("--only", type=int, default=len(CASES))
    options = parser.parse_args()
    torch.set_num_threads(1)
    if options.part == "thousand":
        print(json.dumps(thousand(), indent=1))
        return
    rows = measured(options)
    print(json.dumps(summary_of(options.part, list(rows.values())), indent=1))


if __name__ == "__main__":
    main()
