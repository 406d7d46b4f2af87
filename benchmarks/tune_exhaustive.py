"""Every config of a space, and how many of them the tuner needs to come close to the best.

    python benchmarks/tune_exhaustive.py
    python benchmarks/tune_exhaustive.py --folder F --seconds 280

A GPT trains on two ranks of one thread each (tune_worker.py). ``drivetrain tune`` tries every
config once in a random order, then a tuner by a model begins anew, with trials of its own and a
quarter of the configs. ``share of the best``: the samples a second of the config that it chose
over those of the best one, both as the search of all measured them. Trials are timed by the clock:
the machine should do nothing else. With --folder a later call goes on where the last one ended, and
--seconds ends a call between two trials.

``replayed`` says what luck had to do with it: the same search over the measured figures, each
shaken by 3 % at random, 200 times: the part of them that come within 5 % of the best.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from drivetrain_autotuning.search import search

RANKS, NOISE, REPLAYS, CLOSE = 2, 0.03, 200, 0.95

SPACE: dict[str, list[Any]] = {
    "train_micro_batch_size_per_gpu": [2, 4, 8],
    "gradient_accumulation_steps": [1, 4],
    "zero_optimization.stage": [1, 3],
    "zero_optimization.offload_optimizer.device": ["none", "cpu"],
    "activation_checkpointing.recompute": ["none", "all"],
}


def config(folder: Path, name: str, **keys: Any) -> Path:
    """A config that is tuned, with its trials in a folder of its own."""
    file = folder / f"{name}.json"
    section = {
        "enabled": True,
        "space": SPACE,
        "start_profile_step": 2,
        "end_profile_step": 4,
        "results_dir": str(folder / f"{name}-results"),
        "exps_dir": str(folder / f"{name}-trials"),
        **keys,
    }
    given = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4}},
        "zero_optimization": {"stage": 0},
        "autotuning": section,
    }
    file.write_text(json.dumps(given, indent=1), "utf-8")
    return file


def tune(file: Path, seconds: float | None) -> None:
    """Run the tuner; what it tried stays where it ended."""
    script = str(Path(__file__).with_name("tune_worker.py"))
    command = [sys.executable, "-m", "drivetrain.cli", "tune", "--nproc", str(RANKS), str(file)]
    process = subprocess.Popen(
        [*command, script, "--config", "{config}"],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=sys.stderr,
    )
    try:
        code = process.wait(seconds)
    except subprocess.TimeoutExpired:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise SystemExit("ended between trials: call it again with the same --folder") from None
    if code:
        raise SystemExit(f"drivetrain tune ended with {code}")


def trials(folder: Path, name: str) -> dict[tuple[tuple[str, Any], ...], float | None]:
    """Choice -> samples a second; ``None`` where it failed."""
    found = {}
    for file in sorted((folder / f"{name}-trials").glob("*.json")):
        trial = json.loads(file.read_text("utf-8"))
        found[tuple(trial["choice"].items())] = None if trial["error"] else trial["throughput"]
    return found


def replayed(every: dict[Any, float | None], most: int) -> float:
    """Part of the searches over shaken figures that come close to the best."""
    choices, best = list(every), max(score for score in every.values() if score)
    close = 0
    for seed in range(REPLAYS):
        shake = np.random.default_rng(seed).normal(1.0, NOISE, len(choices))
        shaken = {c: each and each * s for (c, each), s in zip(every.items(), shake, strict=True)}
        tried = search(choices, shaken.__getitem__, how="model_based", most=most, patience=most)
        chosen = max(tried, key=lambda choice: tried[choice] or 0.0)
        close += (every[chosen] or 0.0) >= CLOSE * best
    return close / REPLAYS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--folder", type=Path, help="Keep trials here, and go on from them.")
    parser.add_argument("--seconds", type=float, help="End after so many.")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="drivetrain-tune-") as made:
        folder = given.folder or Path(made)
        folder.mkdir(parents=True, exist_ok=True)
        enough = 10_000
        how = {"tuner_num_trials": enough, "tuner_early_stopping": enough}
        tune(config(folder, "all", tuner_type="random", **how), given.seconds)
        every = trials(folder, "all")
        most = len(every) // 4
        how = {"tuner_num_trials": most, "tuner_early_stopping": most}
        tune(config(folder, "tuner", **how), given.seconds)
        few = trials(folder, "tuner")
        best = max(every, key=lambda choice: every[choice] or 0.0)
        chosen = max(few, key=lambda choice: few[choice] or 0.0)
        scores = sorted((score for score in every.values() if score), reverse=True)
        shown = {
            "configs": len(every),
            "failed": sum(score is None for score in every.values()),
            "within 5 % of the best": sum(s >= CLOSE * scores[0] for s in scores),
            "median over the best": round(scores[len(scores) // 2] / scores[0], 3),
            "best": dict(best),
            "trials": len(few),
            "trials over configs": round(len(few) / len(every), 3),
            "chosen": dict(chosen),
            "share of the best": round((every[chosen] or 0.0) / scores[0], 3),
            "replayed": replayed(every, most),
        }
    print(json.dumps(shown, indent=1))


if __name__ == "__main__":
    main()
