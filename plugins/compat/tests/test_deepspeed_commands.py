"""``deepspeed SCRIPT`` and ``ds_report``."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from deepspeed._commands import launch, report

SCRIPT = """
import argparse, os
parser = argparse.ArgumentParser()
parser.add_argument("--local_rank", type=int, default=-1)
parser.add_argument("--name")
args = parser.parse_args()
assert __name__ == "__main__" and os.environ["LOCAL_RANK"] == str(args.local_rank)
print(args.name, args.local_rank, os.environ["WORLD_SIZE"], os.environ.get("FROM_FILE"), flush=True)
"""


def test_a_script_runs_on_several_ranks_with_what_deepspeed_passes(tmp_path):
    (tmp_path / "train.py").write_text(SCRIPT)
    (tmp_path / ".deepspeed_env").write_text("# a comment\nFROM_FILE=yes\n")
    command = [str(Path(sys.executable).with_name("deepspeed")), "--num_gpus", "2"]
    command += ["--enable_each_rank_log", "logs", "train.py", "--name", "x"]
    environment = {**os.environ, "HOME": str(tmp_path)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "x 0 2 yes" in done.stdout
    texts = [path.read_text() for path in (tmp_path / "logs").rglob("*") if path.is_file()]
    assert any("x 1 2 yes" in text for text in texts)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--num_nodes", "2", "x.py"], "several hosts are not served"),
        (["--include", "worker-9:0", "x.py"], "names other hosts than this one"),
        (["--include", "localhost:0", "--exclude", "localhost:1", "x.py"], "given together"),
        (["--include", "localhost:a", "x.py"], "devices are given as localhost:0,2"),
        (["--no_python", "x.py"], "SCRIPT must be Python"),
        (["--hostfile", "two", "x.py"], "names 2 hosts"),
        (["--hostfile", "bad", "x.py"], "expected a line `host slots=N`"),
        (["--hostfile", "none", "x.py"], "hostfile none: No such file"),
        (["nothing.py"], "script 'nothing.py' does not exist"),
    ],
)
def test_what_is_not_served_is_refused(arguments, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.py").touch()
    (tmp_path / "two").write_text("a slots=2\nb slots=2\n")
    (tmp_path / "bad").write_text("a slots=many\n")
    done = CliRunner().invoke(launch.main, arguments)
    assert done.exit_code == 1
    assert words in done.output


def test_devices_are_chosen_by_filters_and_a_hostfile(tmp_path, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "hosts").write_text("localhost slots=4  # this one\n")
    assert launch._devices("", "", None) is None
    assert launch._devices("", "", tmp_path / "hosts") == 4
    assert launch._devices("localhost:0,2", "", None) == 2
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,2"
    assert launch._devices("", "localhost:1", tmp_path / "hosts") == 3
    assert os.environ["CUDA_VISIBLE_DEVICES"] == "0,2,3"


def test_ds_report_shows_what_there_is():
    done = CliRunner().invoke(report.main, ["--hide_operator_status"])
    assert done.exit_code == 0, done.output
    assert "torch" in done.output
