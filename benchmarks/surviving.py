"""Kill random ranks of a job again and again, and compare what it becomes, as JSON.

    python benchmarks/surviving.py --stage 2 --minutes 10
    python benchmarks/surviving.py --stage 3 --minutes 1 --between 5 --without-spare

Four ranks train a small GPT with ``survival`` and ``exact``; every ``--between`` seconds one of
them, chosen at random, is killed by SIGKILL. ``recovery_*`` are the seconds from the kill to the
end of the first step of the ranks that were started again; ``moments_median`` when on this way
their script began, they had an engine, and the copy was loaded. ``without_spare`` has those of a
second run in which ranks begin with Python. ``files_opened`` and ``disk_bytes`` are counted on all
ranks while they resume. Then a job without kills trains as many steps: it is told to leave
(SIGTERM), and goes on from its checkpoint, on 4, 3, 2 and 4 ranks. ``equal`` says whether all
weights of both are the same bits. ``left`` are files in /dev/shm and keepers that are there
afterwards and were not before.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

SCRIPT = Path(__file__).with_name("surviving_worker.py")
RANKS = 4
BATCH = 12


def main() -> None:
    """Print the figures."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--stage", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=10.0)
    parser.add_argument("--between", type=float, default=20.0, help="seconds between two kills")
    parser.add_argument("--pace", type=float, default=0.25, help="seconds of a step, at least")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--without-spare", action="store_true", help="measure that, too")
    options = parser.parse_args()
    before = left_over()
    with tempfile.TemporaryDirectory(prefix="surviving_") as place:
        folder = Path(place).resolve()
        found, steps = killed(options, folder / "killed", spare=True)
        if options.without_spare:
            cold, _ = killed(options, folder / "cold", spare=False)
            found["without_spare"] = {k: v for k, v in cold.items() if k.startswith("recovery")}
            median = cold["recovery_median"]
            found["spare_of_cold"] = round(found["recovery_median"] / median, 3)
        planned(options.stage, folder / "planned", steps)
        one, other = (torch.load(folder / name / "end.pt") for name in ("killed", "planned"))
    found["steps"] = [one["steps"], other["steps"]]
    names = one["weights"].keys() | other["weights"].keys()
    found["equal"] = all(torch.equal(one["weights"][n], other["weights"][n]) for n in names)
    deadline = time.monotonic() + 30
    while (left := left_over() - before) and time.monotonic() < deadline:
        time.sleep(0.2)  # a keeper ends after its owner
    found["left"] = sorted(left)
    print(json.dumps(found, indent=2))


def config(stage: int, save_dir: Path | None) -> dict[str, Any]:
    """The job's; with a folder it leaves when it is told to, without one it has copies."""
    own: dict[str, Any] = {"survival": {"every": 5}}
    if save_dir is not None:
        own = {"preemption": {"enabled": True, "save_dir": str(save_dir)}}
        own["survival"] = {"enabled": False}
    return {
        "train_batch_size": BATCH,
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
        "zero_optimization": {"stage": stage},
        "exact": {},
        **own,
    }


def job(folder: Path, ranks: int, *options: str, **order: Any) -> subprocess.Popen[bytes]:
    """Start a job."""
    defaults = {"pace": 0.0, "until": None, "leave_at": None, "save_dir": None}
    text = json.dumps({"folder": str(folder), **defaults, **order})
    command = [
        *(str(Path(sys.executable).with_name("drivetrain")), "run", "--nproc", str(ranks)),
        *("--log-dir", str(folder / f"logs{len(list(folder.iterdir()))}"), *options),
        *(str(SCRIPT), text),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=environment, stdout=sys.stderr, cwd=folder)


def killed(options: argparse.Namespace, folder: Path, *, spare: bool) -> tuple[dict[str, Any], int]:
    """A job of which ranks are killed: figures, and the steps that it has trained."""
    folder.mkdir()
    chance, seconds = random.Random(options.seed), list[float]()  # noqa: S311 - no secret
    extra = ["--spare"] if spare else []
    order = {"config": config(options.stage, None), "pace": options.pace}
    process = job(folder, RANKS, "--max-restarts", "1000", *extra, **order)
    try:
        awaited(process, folder / "0.started.json")
        end, start, ranks = time.monotonic() + 60 * options.minutes, 0, list[int]()
        parts = list[dict[str, float]]()
        due = time.monotonic() + options.between
        while due < end:
            time.sleep(max(0.0, due - time.monotonic()))
            rank = chance.randrange(RANKS)
            victim = int((folder / f"{start}-rank{rank}.pid").read_text("utf-8"))
            moment = time.time()
            os.kill(victim, signal.SIGKILL)
            start += 1
            facts = awaited(process, folder / f"{start}.started.json")
            seconds.append(facts["moments"]["stepped"] - moment)
            parts.append({k: round(v - moment, 2) for k, v in facts["moments"].items()})
            ranks.append(rank)
            assert facts["from"].startswith("keeper://"), facts
            due = max(due + options.between, time.monotonic() + 1)
        (folder / "stop").touch()
        assert process.wait(120) == 0
    finally:
        if process.poll() is None:
            process.terminate()
            process.wait()
    reads = [json.loads(path.read_text("utf-8")) for path in folder.glob("*.read.json")]
    found = {
        "stage": options.stage,
        "kills": len(seconds),
        "ranks_killed": ranks,
        "recovery_median": round(statistics.median(seconds), 2),
        "recovery_longest": round(max(seconds), 2),
        "moments_median": {
            name: round(statistics.median(each[name] for each in parts), 2) for name in parts[0]
        },
        "resumes": len(reads),
        "files_opened": sorted({name for facts in reads for name in facts["opened"]}),
        "disk_bytes": sum(facts["disk_bytes"] for facts in reads),
    }
    return found, torch.load(folder / "end.pt")["steps"]


def planned(stage: int, folder: Path, steps: int) -> None:
    """The same training, on numbers of ranks that change when nobody is killed."""
    folder.mkdir()
    saved = folder / "saved"
    order = {"config": config(stage, saved), "save_dir": str(saved), "until": steps}
    for part, ranks in enumerate((RANKS, 3, 2, RANKS), start=1):
        leave_at = steps * part // 4 if part < 4 else None
        process = job(folder, ranks, leave_at=leave_at, **order)
        assert process.wait(1200) == 0
        (folder / "0.started.json").unlink()


def awaited(process: subprocess.Popen[bytes], path: Path) -> dict[str, Any]:
    """The contents of a file, when it is there."""
    while not path.exists():
        if process.poll() is not None:
            raise SystemExit(f"the job has ended with {process.returncode}; see what it said")
        time.sleep(0.01)
    found: dict[str, Any] = json.loads(path.read_text("utf-8"))
    return found


def left_over() -> set[str]:
    """What a job may leave: shared memory, and processes that keep copies."""
    found = {path.name for path in Path("/dev/shm").iterdir()}  # noqa: S108 - looked at
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(word.startswith(b"drivetrain_elasticity.keeper") for word in words):
            found.add(f"keeper {path.parent.name}")
    return found


if __name__ == "__main__":
    main()
