"""Every config of a space, and how many of them the tuner needs to come close to the best, as JSON.

    python benchmarks/tune_exhaustive.py
    python benchmarks/tune_exhaustive.py --clock wall

A GPT of four blocks (1.4 million parameters) trains for some steps on two ranks of one thread each,
with every combination of micro-batch, accumulation, ZeRO stage, place of optimizer states and
recomputation, in a random order. Then the tuner's search begins anew four times, each time with
trials of its own and a quarter of the configs: twice knowing nothing beforehand, and twice with the
plans of all configs, as ``drivetrain tune --model`` has them. ``share of the best``: the samples a
second of the config that it chose over those of the best one, both as the search of all measured
them; the worse one of the two. Seconds are those of the processor, of the rank that took most, for
the machine may do other work; with ``--clock wall`` they are those of the clock. Trials run in
processes that are kept, not in a new one each, as ``drivetrain tune`` does, so that the search of
all takes minutes.

``replayed`` says what luck had to do with it: the same searches over the measured figures, each
shaken by 3 % at random, 40 times: the part of them that come within 5 % of the best.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
from drivetrain_autotuning.search import search
from drivetrain_autotuning.section import AutotuningSection
from drivetrain_autotuning.space import Choice, choices_in, config_of, name_of, possible
from drivetrain_cli.memory import Ranks
from drivetrain_cli.planning.machine_table import MachineTable
from drivetrain_cli.planning.measuring import (
    measure_collectives,
    measure_machine,
    time_operators,
)
from drivetrain_cli.planning.overhead import overhead_of
from drivetrain_cli.planning.rehearsed import Rehearsed
from drivetrain_cli.planning.subject import Subject
from drivetrain_cli.planning.verdict import Question, answer
from drivetrain_cli.stand_in import without_memory

import drivetrain
from drivetrain.job.accelerator_choice import choose_accelerator
from drivetrain.testing import run_distributed
from drivetrain.testing.models import TinyGPT

RANKS, WORDS, LENGTH, STEPS = 2, 512, 64, 4
AGAIN = 3
"""How often the best quarter is measured again: one trial differs by 5 % from the next."""

NOISE, REPLAYS, RUNS, CLOSE = 0.03, 40, 2, 0.95

GIVEN: dict[str, Any] = {
    "train_micro_batch_size_per_gpu": 1,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
}

SPACE: dict[str, list[Any]] = {
    "train_micro_batch_size_per_gpu": [2, 4, 8],
    "gradient_accumulation_steps": [1, 4],
    "zero_optimization.stage": [0, 1, 2, 3],
    "zero_optimization.offload_optimizer.device": ["none", "cpu"],
    "activation_checkpointing.recompute": ["none", "all"],
}


def model_of() -> TinyGPT:
    return TinyGPT(WORDS, 160, 4, positions=LENGTH)


def trial(config: dict[str, Any]) -> tuple[float, float]:
    """Seconds of the quickest step on this rank: of the clock, and of the processor.

    What disturbs a step makes it longer, so the quickest is disturbed least.
    """
    torch.manual_seed(0)
    torch.set_num_threads(1)
    engine, *_ = drivetrain.initialize(model=model_of(), config=config)
    samples = engine.train_micro_batch_size_per_gpu()
    wall, processor = [], []
    for _ in range(STEPS):
        begun, used = time.perf_counter(), time.process_time()
        for _ in range(engine.gradient_accumulation_steps()):
            tokens = torch.randint(WORDS, (samples, LENGTH), device=engine.device)
            engine.backward(engine(tokens, tokens))
            engine.step()
        wall.append(time.perf_counter() - begun)
        processor.append(time.process_time() - used)
    engine.destroy()
    engine.job.close()
    return min(wall[1:]), min(processor[1:])


class Trials:
    """Runs trials, and keeps their scores; of one that is run again, the mean.

    Args:
        clock: which seconds count.

    Attributes:
        runs: how many there were.
    """

    def __init__(self, clock: str) -> None:
        self.scores: dict[Choice, float | None] = {}
        self.runs = 0
        self._all: dict[Choice, list[float]] = {}
        self._place = ("wall", "processor").index(clock)

    def run(self, choice: Choice) -> float | None:
        """Samples a second; ``None`` if it fails."""
        config = config_of(GIVEN, choice)
        try:
            ranks = run_distributed(trial, RANKS, config)
        except Exception as error:  # noqa: BLE001 - what fails is a result
            print(f"{name_of(choice)}: {error}", file=sys.stderr, flush=True)
            return None
        seconds = max(rank[self._place] for rank in ranks)
        values = dict(choice)
        batch = values["train_micro_batch_size_per_gpu"] * values["gradient_accumulation_steps"]
        score = RANKS * batch / seconds
        self.runs += 1
        known = self._all.setdefault(choice, [])
        known.append(score)
        score = self.scores[choice] = sum(known) / len(known)
        print(f"{self.runs:3} {name_of(choice)}: {score:.2f}", file=sys.stderr, flush=True)
        return score


def foretold(choices: list[Choice]) -> dict[Choice, float]:
    """Samples a second by the plans of configs, with a table of this machine."""
    accelerator = choose_accelerator()
    table = measure_machine(accelerator, 0.02)
    table.overhead = overhead_of(accelerator, 0.02)
    table.collectives = measure_collectives(RANKS)

    def timed(table: MachineTable, rehearsed: Rehearsed) -> None:
        found = rehearsed.operators.found.values()
        missing = [o for o in found if o.signature not in table.operators]
        table.operators |= time_operators(missing, accelerator, 0.01)

    subject = Subject(lambda: without_memory(model_of, "gpt"), "gpt", LENGTH, None, [])
    found: dict[Choice, float] = {}
    for choice in choices:
        config, ranks = config_of(GIVEN, choice), Ranks(RANKS, 1, on_cpu=True)
        verdict = answer(Question(config, subject, ranks, RANKS, None, table, False), timed)
        assert verdict.price is not None
        found[choice] = verdict.ranks[0].samples / verdict.price.seconds
    return found


def replayed(
    every: dict[Choice, float | None], most: int, before: dict[Choice, float] | None
) -> float:
    """Part of the searches over shaken figures that come close to the best."""
    choices, best = list(every), max(score for score in every.values() if score)
    close = 0
    for seed in range(REPLAYS):
        random = np.random.default_rng(seed)
        seen: dict[Choice, list[float]] = {}

        def shaken(choice: Choice, seen: Any = seen, random: Any = random) -> float | None:
            true = every[choice]
            if true is None:
                return None
            found = seen.setdefault(choice, [])
            found.append(true * float(random.normal(1.0, NOISE)))
            return sum(found) / len(found)

        options: dict[str, Any] = {"most": most, "patience": most, "foretold": before}
        tried = search(choices, shaken, how="model_based", **options)
        chosen = max(tried, key=lambda choice: tried[choice] or 0.0)
        close += (every[chosen] or 0.0) >= CLOSE * best
    return close / REPLAYS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--clock", choices=["processor", "wall"], default="processor")
    parser.add_argument("--keep", type=Path, help="File for the figures of all configs, JSON.")
    given = parser.parse_args()
    choices, _ = possible(GIVEN, choices_in(SPACE), RANKS, AutotuningSection())
    all_, enough = Trials(given.clock), len(choices)
    every = search(choices, all_.run, how="random", most=enough, patience=enough)
    for _ in range(AGAIN):
        for choice in sorted(every, key=lambda choice: -(every[choice] or 0.0))[: enough // 4]:
            every[choice] = all_.run(choice)
    scores = sorted((score for score in every.values() if score), reverse=True)
    most = len(choices) // 4
    shown: dict[str, Any] = {
        "configs": len(every),
        "failed": sum(score is None for score in every.values()),
        "within 5 % of the best": sum(score >= CLOSE * scores[0] for score in scores),
        "median over the best": round(scores[len(scores) // 2] / scores[0], 3),
        "best": name_of(max(every, key=lambda choice: every[choice] or 0.0)),
    }
    ways = {"alone": None, "with plans": foretold(choices)}
    for name, before in ways.items():
        runs = []
        for _ in range(RUNS):
            own = Trials(given.clock)
            options: dict[str, Any] = {"most": most, "patience": most, "foretold": before}
            few = search(choices, own.run, how="model_based", **options)
            runs.append((own.runs, max(few, key=lambda choice: few[choice] or 0.0)))
        shares = [(every[chosen] or 0.0) / scores[0] for _, chosen in runs]
        shown[name] = {
            "chosen": [name_of(chosen) for _, chosen in runs],
            "trials over configs": round(max(count for count, _ in runs) / len(every), 3),
            "shares": [round(share, 3) for share in shares],
            "share of the best": round(min(shares), 3),
            "replayed": replayed(every, most, before),
        }
    if given.keep:
        planned = [(choice, score) for choice, score in (ways["with plans"] or {}).items()]
        given.keep.write_text(json.dumps([list(every.items()), planned]), "utf-8")
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
