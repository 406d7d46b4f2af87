"""``examples/moe``: a GPT with experts on two ranks beside the dense one, and its load drawn."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

DRIVETRAIN = [sys.executable, "-m", "drivetrain.cli"]
SMALL = ["--layers", 1, "--width", 32, "--context", 64, "--validation", 8, "--steps", 6]


def drivetrain(root: Path, *arguments: object) -> str:
    command = [*DRIVETRAIN, *map(str, arguments)]
    done = subprocess.run(command, cwd=root, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_a_gpt_with_experts_learns_beside_the_dense_one(root: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the cat sat on the mat. ü\n" * 2000, "utf-8")
    out, logs = tmp_path / "out", tmp_path / "logs"
    run = ["run", "--nproc", 2, "--log-dir", logs, "examples/moe/train.py", *SMALL]
    said = drivetrain(root, *run, "--out", out, "--data", tmp_path / "text.txt")
    found = re.findall(r"(.*): ([\d,]+) parameters, held-out text: ([\d.]+) bits", said)
    (dense, small, dense_bits), (experts, large, bits) = found
    assert (dense[-5:], experts[-22:]) == ("dense", "8 experts, one a token")
    # 7 more experts of 2 matrices of 32 x 128, and a router for 8.
    more = int(large.replace(",", "")) - int(small.replace(",", ""))
    assert more == 7 * 2 * 32 * 128 + 8 * 32
    assert max(float(dense_bits), float(bits)) < 7.9  # 8 at first
    picture = (out / "loss.svg").read_text("utf-8")
    for text in ("dense: training", "8 experts, one a token: training", "bits per byte"):
        assert text in picture
    rows = [json.loads(line) for line in (out / "load.jsonl").read_text("utf-8").splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert [len(row["load"]["blocks.0.mlp"]) for row in rows] == [8] * 6
    summary = drivetrain(root, "moe", "load", out / "load.jsonl")
    assert summary.startswith("blocks.0.mlp: steps 1 to 6, 8 experts")
    assert (out / "load.svg").read_text("utf-8").startswith("<svg")
