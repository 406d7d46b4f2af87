"""The quickstart's run, killed without warning, goes on as if nothing had been."""

from __future__ import annotations

import json
import os
import random
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

SMALL = shlex.split("--layers 1 --width 32 --context 64 --validation 4 --sample 4")
STEPS = 60
PATIENCE = 300.0


def start(root: Path, out: Path, logs: Path, *arguments: str) -> subprocess.Popen[str]:
    run = [*(sys.executable, "-m", "drivetrain.cli", "run", "--nproc", "2"), "--log-dir"]
    script = ["examples/train_gpt.py", *SMALL, "--steps", str(STEPS), "--save-every", "4"]
    return subprocess.Popen(
        [*run, str(logs), *script, "--out", str(out), *arguments],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def curve(out: Path) -> list[float]:
    """The losses that the run has saved with its last checkpoint."""
    manifest = out / "checkpoints" / f"global_step{STEPS}" / "manifest.json"
    losses: list[float] = json.loads(manifest.read_text())["manifest"]["client_state"]["losses"]
    return losses


def test_killed_at_a_random_moment_and_resumed_it_has_the_same_loss_curve(
    root: Path, tmp_path: Path
) -> None:
    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    process = start(root, unbroken, tmp_path / "logs1")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    process = start(root, broken, tmp_path / "logs2")
    begin, chance = time.monotonic(), random.SystemRandom()
    # A step is chosen, and not a number of seconds, in which a fast machine could take all of them.
    first, some = "latest", f"global_step{chance.randrange(4, STEPS - 15, 4)}"
    while not all((broken / "checkpoints" / name).exists() for name in (first, some)):
        assert process.poll() is None
        assert time.monotonic() - begin < PATIENCE
        time.sleep(0.01)
    time.sleep(chance.uniform(0.0, 0.1))
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert not (broken / "checkpoints" / f"global_step{STEPS}").exists()
    process = start(root, broken, tmp_path / "logs3", "--resume")
    output, _ = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, output
    assert "resumed from" in output
    assert curve(broken) == curve(unbroken)
    assert len(curve(broken)) == STEPS
