"""``examples/moe/captions.py``: vision and language experts learn to caption scenes never seen."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

DRIVETRAIN = [sys.executable, "-m", "drivetrain.cli"]


def drivetrain(root: Path, *arguments: object) -> str:
    command = [*DRIVETRAIN, *map(str, arguments)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=1800)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.long
def test_experts_of_patches_and_of_words_caption_scenes_never_seen(
    root: Path, tmp_path: Path
) -> None:
    script, logs = "examples/moe/captions.py", tmp_path / "logs"
    said = drivetrain(
        root, "run", "--nproc", 2, "--log-dir", logs, script, "--out", tmp_path, "--steps", 300
    )
    found = re.search(r"scenes never seen: ([\d.]+)% of captions have no wrong word", said)
    assert found is not None
    assert float(found[1]) > 90
    load = drivetrain(root, "moe", "load", tmp_path / "load.jsonl")
    for layer in range(3):
        assert f"blocks.{layer}.vision: steps 1 to 300, 4 experts" in load
        assert f"blocks.{layer}.language: steps 1 to 300, 4 experts" in load
