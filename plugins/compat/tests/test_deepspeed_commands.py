"""``deepspeed SCRIPT`` and ``ds_report``."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import click
import pytest
from click.testing import CliRunner
from deepspeed._commands import launch, report
from deepspeed.launcher import runner

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
        (["--num_nodes", "2", "x.py"], "several hosts need a hostfile"),
        (["--no_ssh", "--num_nodes", "2", "x.py"], "--no_ssh needs --node_rank"),
        (["--hostfile", "two", "--elastic_training", "x.py"], "needs --master_addr"),
        (["--include", "worker-9:0", "x.py"], "names other hosts than this one"),
        (["--include", "localhost:0", "--exclude", "localhost:1", "x.py"], "given together"),
        (["--include", "localhost:a", "x.py"], "devices are given as localhost:0,2"),
        (["--num_gpus", "1", "-i", "localhost:0", "x.py"], "count from the first host and device"),
        (["--num_nodes", "1", "-e", "localhost:0", "x.py"], "count from the first host and device"),
        (["--no_python", "x.py"], "SCRIPT must be Python"),
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
    with pytest.raises(ValueError, match=re.escape(words)):
        runner.main(arguments)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (
            ["--hostfile", "two", "--num_gpus", "1", "--master_port", "1234", "x.py", "--lr", "1"],
            [
                *("launch", "--hostfile", "two", "--master-port", "1234", "--num-gpus", "1"),
                *("-m", "deepspeed._commands.rank", "script", "1", "x.py", "--lr", "1"),
            ],
        ),
        (
            [
                *("--hostfile", "two", "--include", "a:0@b", "--launcher", "openmpi"),
                *("--launcher_args", "-v", "--bind_cores_to_rank", "--no_local_rank"),
                *("--elastic_training", "--master_addr", "a", "--max_elastic_nodes", "4", "x.py"),
            ],
            [
                *("launch", "--hostfile", "two", "--master-port", "29500", "--include", "a:0@b"),
                *("--master-addr", "a", "--launcher", "openmpi", "--launcher-args", "-v"),
                *("--elastic", "1:4", "--max-restarts", "100", "--bind-cores"),
                *("-m", "deepspeed._commands.rank", "script", "0", "x.py"),
            ],
        ),
        (
            [
                *("--no_ssh", "--node_rank", "1", "--num_nodes", "2", "--master_addr", "10.0.0.1"),
                *("--num_gpus", "8", "--module", "job"),
            ],
            [
                *("run", "--nproc", "8", "--nnodes", "2", "--node-rank", "1"),
                *("--master-addr", "10.0.0.1", "--master-port", "29500"),
                *("-m", "deepspeed._commands.rank", "module", "1", "job"),
            ],
        ),
    ],
)
def test_several_hosts_are_passed_on(arguments, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "x.py").touch()
    (tmp_path / "two").write_text("a slots=2\nb slots=2\n")
    passed = []
    monkeypatch.setattr(launch.drivetrain, "main", lambda command, **_: passed.append(command))
    done = CliRunner().invoke(launch.main, arguments, catch_exceptions=False)
    assert done.exit_code == 0, done.output
    assert passed == [expected]


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


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--deepspeed_config", "ds.json"], ["--deepspeed_config", "{config}"]),
        (
            ["--deepspeed", "--deepspeed_config=ds.json"],
            ["--deepspeed", "--deepspeed_config={config}"],
        ),
        (["--deepspeed", "ds.json", "--lr", "1"], ["--deepspeed", "{config}", "--lr", "1"]),
    ],
)
def test_autotuning_is_the_tuner_with_the_scripts_config(given, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "train.py").touch()
    (tmp_path / "ds.json").write_text("{}")
    passed = []
    monkeypatch.setattr(launch.drivetrain, "main", lambda command, **_: passed.append(command))
    result = CliRunner().invoke(
        launch.main, ["--autotuning", "run", "--num_gpus", "2", "train.py", *given]
    )
    assert result.exit_code == 0, result.output
    own = ["-m", "deepspeed._commands.rank", "script", "1", "train.py"]
    assert passed == [["tune", "--nproc", "2", "--run", "--", "ds.json", *own, *expected]]


@pytest.mark.parametrize(
    ("ends", "code"),
    [(None, 0), (SystemExit(0), 0), (SystemExit(5), 5), (click.ClickException("no rank"), 1)],
)
def test_a_script_that_starts_ranks_goes_on_unless_they_fail(ends, code, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(launch, "DEFAULT_HOSTFILE", tmp_path / "none")
    (tmp_path / "train.py").touch()

    @click.command(context_settings={"ignore_unknown_options": True})
    @click.argument("words", nargs=-1)
    def command(words):
        if ends is not None:
            raise ends

    monkeypatch.setattr(launch, "drivetrain", command)
    arguments = ["--num_gpus", "1", str(tmp_path / "train.py")]
    if code == 0:
        runner.main(arguments)
    else:
        with pytest.raises(SystemExit) as end:
            runner.main(arguments)
        assert end.value.code == code


def test_autotuning_without_ranks_or_a_config_is_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "train.py").touch()
    for options, words in (
        (["train.py"], "needs --num_gpus"),
        (["--num_gpus", "1", "train.py", "--deepspeed"], "followed by a config file"),
    ):
        result = CliRunner().invoke(launch.main, ["--autotuning", "tune", *options])
        assert result.exit_code == 1
        assert words in result.output
