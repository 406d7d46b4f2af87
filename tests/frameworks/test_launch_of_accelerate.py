"""``accelerate launch`` runs a script on shards that knows nothing of them."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import tiny

from drivetrain.testing import run_distributed

NEEDS = ("accelerate",)

pytestmark = pytest.mark.long


def plain(told):
    from launched import main

    tiny.start_anew()
    main(told, cpu=True)


@pytest.mark.parametrize("stage", [2, 3])
def test_a_script_is_launched_on_shards(stage, tmp_path):
    run_distributed(plain, 2, str(tmp_path / "plain"))
    script = Path(__file__).with_name("launched.py")
    command = [sys.executable, "-m", "accelerate.commands.launch", "--num_processes", "2"]
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--num_machines", "1"]
    command += ["--use_deepspeed", "--zero_stage", str(stage), "--gradient_clipping", "100.0"]
    done = subprocess.run(
        [*command, script, tmp_path / "shards"], capture_output=True, text=True, timeout=200
    )
    assert done.returncode == 0, done.stdout + done.stderr
    reference, found = (json.loads((tmp_path / name).read_text()) for name in ("plain", "shards"))
    assert (reference["stage"], found["stage"]) == (None, stage)
    assert len(found["losses"]) == 4
    assert found["losses"] == pytest.approx(reference["losses"], rel=1e-5)
