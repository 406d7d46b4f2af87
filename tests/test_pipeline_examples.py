"""The example of pipelines has the same losses on stages, on data shards and in one process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent


def losses(ranks: int, *arguments: str, logs: Path) -> list[float]:
    run = [sys.executable, "-m", "drivetrain.cli", "run", "--nproc", str(ranks)]
    run += ["--log-dir", str(logs), "examples/pipeline_gpt2.py", "--steps", "4", *arguments]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [float(text) for text in re.findall(r"loss (\d+\.\d+)", done.stdout)]


def test_stages_have_the_losses_of_one_process(tmp_path: Path) -> None:
    alone = losses(1, "--set", "pipeline.stages=1", logs=tmp_path / "alone")
    stages = losses(4, logs=tmp_path / "stages")
    assert len(alone) == 4
    assert stages == pytest.approx(alone, rel=1e-4)
