"""``drivetrain verify`` runs a script, ends it after its steps, and says what it found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = """
import argparse
import torch
from torch import nn
import drivetrain

parser = argparse.ArgumentParser()
parser.add_argument("--config")
parser.add_argument("--steps", type=int, default=50)
given = parser.parse_args()
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Dropout(0.2), nn.Linear(8, 1))
engine, *_ = drivetrain.initialize(model=model, config=given.config)
for step in range(given.steps):
    loss = engine(torch.randn(2, 4)).square().mean()
    engine.backward(loss)
    engine.step()
print("the end")
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "train.py").write_text(SCRIPT, "utf-8")
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
    }
    (tmp_path / "job.json").write_text(json.dumps(config), "utf-8")
    return tmp_path


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "drivetrain.cli", "verify", *arguments]
    return subprocess.run(
        command, cwd=folder, capture_output=True, text=True, check=False, timeout=200
    )


def test_a_script_is_run_with_two_ranks_and_ended_after_its_steps(folder: Path) -> None:
    done = run(
        folder, "--nproc", "2", "--steps", "3", "--json", "job.json", "train.py",
        "--config", "{config}",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "the end" not in done.stdout
    verdict = json.loads(done.stdout[done.stdout.index("{") :])
    assert verdict["steps"] == 3
    assert {found["parameter"] for found in verdict["worst"]} == {
        *("0.weight", "0.bias", "3.weight", "3.bias"),
    }
    assert all(found["share"] <= 1 for found in verdict["worst"])
    assert {path.name for path in folder.iterdir()} == {"train.py", "job.json"}


def test_a_script_that_ends_early_is_said_so(folder: Path) -> None:
    done = run(
        folder, "--nproc", "1", "job.json", "train.py", "--config", "{config}", "--steps", "2"
    )
    assert done.returncode != 0
    assert "ended before 5 steps" in done.stderr


def test_it_asks_where_the_config_goes(folder: Path) -> None:
    done = run(folder, "job.json", "train.py", "--config", "job.json")
    assert done.returncode == 2
    assert "{config}" in done.stderr
