"""The same script has the same losses on stages, with layers shared out, and in one process."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def losses(ranks: int, *arguments: str, logs: Path) -> list[float]:
    run = [sys.executable, "-m", "drivetrain.cli", "run", "--nproc", str(ranks)]
    run += ["--log-dir", str(logs), "examples/gpt2.py", "--steps", "4", *arguments]
    done = subprocess.run(run, cwd=ROOT, capture_output=True, text=True, timeout=240, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return [float(text) for text in re.findall(r"loss (\d+\.\d+)", done.stdout)]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Losses of one process."""
    found = losses(1, "--set", "pipeline.stages=1", logs=tmp_path_factory.mktemp("alone"))
    assert len(found) == 4
    return found


@pytest.mark.parametrize(
    "config",
    [
        "gpt2_pipeline_tensor.json",
        pytest.param("gpt2_pipeline.json", marks=pytest.mark.long),
        pytest.param("gpt2_tensor.json", marks=pytest.mark.long),
    ],
)
def test_two_by_two_ranks_have_the_losses_of_one(
    alone: list[float], config: str, tmp_path: Path
) -> None:
    found = losses(4, "--config", f"examples/{config}", logs=tmp_path / "logs")
    assert found == pytest.approx(alone, rel=1e-4)
