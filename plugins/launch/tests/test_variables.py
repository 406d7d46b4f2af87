"""Which environment variables reach the hosts of a job, and which of them may be seen by others."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from drivetrain_launch.variables import exported, without_secrets

from drivetrain.errors import DrivetrainError


def test_what_decides_how_a_job_runs_is_exported_and_nothing_else(tmp_path: Path) -> None:
    own = {"NCCL_DEBUG": "INFO", "HOME": "/root", "PATH": "/bin", "OMP_NUM_THREADS": "4"}
    found = exported(own, (), tmp_path, tmp_path)
    assert found == {"NCCL_DEBUG": "INFO", "OMP_NUM_THREADS": "4", "PYTHONPATH": str(tmp_path)}


def test_the_working_directory_comes_first_in_the_python_path(tmp_path: Path) -> None:
    own = {"PYTHONPATH": os.pathsep.join(["/a", str(tmp_path), "/b"])}
    expected = os.pathsep.join([str(tmp_path), "/a", "/b"])
    assert exported(own, (), tmp_path, tmp_path)["PYTHONPATH"] == expected


def test_files_add_variables_and_the_working_directory_s_wins(tmp_path: Path) -> None:
    home, folder = tmp_path / "home", tmp_path / "work"
    for place, text in ((home, "A=1\nB=home\n"), (folder, "# mine\n\nexport B=work\nC=x=y\n")):
        place.mkdir()
        (place / ".deepspeed_env").write_text(text, "utf-8")
    found = exported({}, (), folder, home)
    assert {name: found[name] for name in "ABC"} == {"A": "1", "B": "work", "C": "x=y"}
    (folder / "other").write_text("A=2\n", "utf-8")
    assert exported({"DS_ENV_FILE": "other"}, (), folder, home)["A"] == "2"


def test_a_wrong_line_of_a_file_is_named(tmp_path: Path) -> None:
    (tmp_path / ".deepspeed_env").write_text("A=1\nB\n", "utf-8")
    with pytest.raises(DrivetrainError, match=r"deepspeed_env:2: 'B' is not of the form"):
        exported({}, (), tmp_path, tmp_path)


def test_wanted_variables_are_taken_with_or_without_a_value(tmp_path: Path) -> None:
    found = exported({"LEVEL": "3"}, ("LEVEL", "COLOR=red"), tmp_path, tmp_path)
    assert (found["LEVEL"], found["COLOR"]) == ("3", "red")
    with pytest.raises(DrivetrainError, match="--export SIZE: the variable is not set"):
        exported({}, ("SIZE",), tmp_path, tmp_path)


def test_secrets_stay_off_command_lines_unless_they_were_asked_for_by_name() -> None:
    variables = {"WANDB_API_KEY": "1", "HF_TOKEN": "2", "NCCL_DEBUG": "INFO"}
    assert without_secrets(variables, ()) == {"NCCL_DEBUG": "INFO"}
    assert set(without_secrets(variables, ("HF_TOKEN",))) == {"HF_TOKEN", "NCCL_DEBUG"}
