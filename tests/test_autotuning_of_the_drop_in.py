"""``deepspeed --autotuning run`` tries configs of an unchanged script and runs it with the best."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

SCRIPT = """
import argparse, time
import torch, deepspeed
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int)
parser = deepspeed.add_config_arguments(parser)
given = parser.parse_args()
model = torch.nn.Linear(8, 8)
engine, *_ = deepspeed.initialize(args=given, model=model, model_parameters=model.parameters())
samples = engine.train_micro_batch_size_per_gpu()
for _ in range(8):
    time.sleep(0.05)
    engine.backward(engine(torch.randn(samples, 8)).square().mean())
    engine.step()
print("trained with", samples)
"""


def test_a_script_of_deepspeed_is_tuned_and_run(tmp_path: Path) -> None:
    (tmp_path / "train.py").write_text(SCRIPT)
    config = {
        "train_micro_batch_size_per_gpu": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "autotuning": {
            "enabled": True,
            "space": {"train_micro_batch_size_per_gpu": [1, 16]},
            "start_profile_step": 2,
            "end_profile_step": 3,
        },
    }
    (tmp_path / "ds.json").write_text(json.dumps(config))
    command = [sys.executable, "-c", "from deepspeed._commands.launch import main; main()"]
    command += [
        "--autotuning",
        "run",
        "--num_gpus",
        "1",
        "train.py",
        "--deepspeed",
        "--deepspeed_config",
        "ds.json",
    ]
    environment = {**os.environ, "HOME": str(tmp_path), "COLUMNS": "100"}
    done = subprocess.run(
        command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "trained with 16" in done.stdout
