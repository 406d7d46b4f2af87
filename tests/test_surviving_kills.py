"""Jobs whose ranks are killed go on from memory, and end with the weights of an unbroken run."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

import drivetrain
from drivetrain.testing import data, models, run_distributed

SCRIPT = Path(__file__).parent / "surviving_script.py"

CONFIG: dict[str, Any] = {
    "train_batch_size": 8,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-3}},
    "survival": {"every": 2},
}


def job(
    folder: Path, ranks: int, restarts: int, *options: str, **order: Any
) -> tuple[str, dict[str, torch.Tensor]]:
    """Output, and weights at the end."""
    weights = folder / f"weights-{len(list(folder.iterdir()))}.pt"
    order = {"config": CONFIG, "steps": 8, "kills": [], "weights": str(weights), **order}
    command = [
        *(str(Path(sys.executable).with_name("drivetrain")), "run", "--nproc", str(ranks)),
        *("--max-restarts", str(restarts), *options),
        *("--log-dir", str(folder / f"logs-{weights.stem}"), str(SCRIPT), json.dumps(order)),
    ]
    found = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=200)
    output = found.stdout + found.stderr
    assert found.returncode == 0, output
    return output, torch.load(weights)


def trained(config: dict[str, Any]) -> dict[str, torch.Tensor]:
    """Weights of a run in which nothing happens."""
    samples = list(zip(*data.tokens(64), strict=True))
    config = {**config, "survival": {"enabled": False}}
    model = models.tiny_gpt()
    engine = drivetrain.initialize(model=model, config=config, training_data=samples)[0]
    for _ in range(8):
        engine.train_batch()
    weights = engine.module_state_dict()
    engine.destroy()
    engine.job.close()
    return weights


def keepers(output: str) -> list[str]:
    """Processes that keep copies of a job which has said whose they are."""
    owners = {words.split()[-1] for words in output.splitlines() if words.startswith("keeper of ")}
    assert len(owners) == 1, output
    lines = [path.read_bytes() for path in Path("/proc").glob("[0-9]*/cmdline") if readable(path)]
    commands = [line.rstrip(b"\0").decode(errors="replace").split("\0") for line in lines]
    return [
        c[-1] for c in commands if c[-2:-1] == ["drivetrain_elasticity.keeper"] and c[-1] in owners
    ]


def readable(path: Path) -> bool:
    try:
        return bool(path.read_bytes())
    except OSError:
        return False


@pytest.mark.parametrize(
    ("zero", "ranks", "kills"),
    [
        ({"stage": 3}, 2, [[3, 1], [5, 0], [7, 1]]),
        pytest.param({"stage": 2}, 2, [[5, 1]], marks=pytest.mark.long),
        pytest.param({"stage": 2}, 2, [[3, 1], [5, 0], [7, 1]], marks=pytest.mark.long),
        pytest.param({"stage": 2}, 4, [[3, 2], [5, 0], [7, 3]], marks=pytest.mark.long),
        pytest.param(
            {"stage": 2, "offload_optimizer": {"device": "cpu"}},
            2,
            [[5, 1]],
            marks=pytest.mark.long,
        ),
    ],
    ids=str,
)
def test_a_killed_rank_costs_some_steps_and_no_read_from_disk(
    zero: dict[str, Any], ranks: int, kills: list[list[int]], tmp_path: Path
) -> None:
    config = {**CONFIG, "zero_optimization": zero}
    output, weights = job(tmp_path, ranks, len(kills), "--spare", config=config, kills=kills)
    for number, (step, _) in enumerate(kills, start=1):
        assert f"start {number}: from keeper://survival/copy at step {step // 2 * 2}" in output
    unbroken = run_distributed(trained, ranks, config)[0]
    assert weights.keys() == unbroken.keys()
    assert all(torch.equal(weights[name], unbroken[name]) for name in weights)
    deadline = time.monotonic() + 20
    while (left := keepers(output)) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert left == []


@pytest.mark.long
def test_the_verdict_of_the_watchdog_starts_the_workers_again(tmp_path: Path) -> None:
    config = {**CONFIG, "zero_optimization": {"stage": 2}, "communication": {"watchdog": {}}}
    output, weights = job(tmp_path, 2, 1, config=config, parts=[0, 5, 1])
    assert "start 1: from keeper://survival/copy at step 4" in output
    unbroken = run_distributed(trained, 2, config)[0]
    assert all(torch.equal(weights[name], unbroken[name]) for name in weights)
