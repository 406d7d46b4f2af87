"""Which tests an environment runs, and how many minutes they may take."""

from __future__ import annotations

import configparser
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import budgets, workspace
from tools.budgets import BUSY, SLACK, Spent


def report(path: Path, *seconds: float) -> Path:
    """A JUnit report with one session for each number of seconds."""
    suites = "".join(
        f'<testsuite name="pytest" tests="1" time="{s}"><testcase time="900"/></testsuite>'
        for s in seconds
    )
    path.write_text(f"<?xml version='1.0'?><testsuites>{suites}</testsuites>")
    return path


def test_the_minutes_are_those_of_the_session_and_not_the_sum_of_its_tests(tmp_path) -> None:
    assert budgets.minutes_in(report(tmp_path / "one.xml", 90)) == 1.5
    assert budgets.minutes_in(report(tmp_path / "two.xml", 90, 30)) == 2


def test_environments_come_with_their_budgets_the_slowest_first(tmp_path) -> None:
    reports = {name: report(tmp_path / name, s) for name, s in {"cpu": 60, "zero": 180}.items()}
    found = budgets.spent(reports, {"cpu": 3, "zero": 2, "core": 8})
    assert found == [Spent("zero", 3, 2), Spent("cpu", 1, 3)]
    heading, first, second = budgets.table(found).splitlines()
    assert heading.split() == ["environment", "minutes", "budget"]
    assert (first.split(), second.split()) == (["zero", "3.0", "2.0", "*"], ["cpu", "1.0", "3.0"])


def test_within_the_slack_a_run_is_good() -> None:
    assert budgets.verdict([Spent("zero", 4 * SLACK, 4), Spent("cpu", 1, 3)], 0) == (False, "")


def test_beyond_the_slack_a_run_fails_with_names_and_minutes() -> None:
    failed, text = budgets.verdict([Spent("cpu", 1, 3), Spent("zero", 4 * SLACK + 0.1, 4)], BUSY)
    assert failed
    assert "zero (5.1 of 4)" in text
    assert "cpu" not in text


def test_on_a_machine_with_other_work_it_is_a_warning() -> None:
    failed, text = budgets.verdict([Spent("zero", 9, 4)], 0.5)
    assert not failed
    assert text.startswith("warning: ")
    assert text.endswith("other work had 50% of the processors")


def burn(seconds: float) -> list[str]:
    code = f"import time\nwhile time.process_time() < {seconds}: pass"
    return [sys.executable, "-c", code]


@pytest.mark.skipif(not Path("/proc/stat").is_file(), reason="only Linux counts processor time so")
def test_ended_children_are_ours_and_a_process_that_goes_on_is_other_work(monkeypatch) -> None:
    # A machine with nothing on it but one processor's second of our child, then of another process.
    readings = iter([(0.0, 0.0, 0.0), (1.0, 1.0, 4.0), (1.0, 3.0, 4.0)])
    monkeypatch.setattr(budgets.OtherWork, "_read", staticmethod(lambda: next(readings)))
    other_work = budgets.OtherWork()
    assert other_work.share() == 0
    assert other_work.share() == 0.5
    monkeypatch.undo()
    # The real counters: work of an ended child counts as ours.
    ours, busy, total = budgets.OtherWork._read()
    subprocess.run(burn(0.3), check=True)
    time.sleep(0.05)
    then = budgets.OtherWork._read()
    assert then[0] - ours >= 0.3
    assert then[1] - busy >= 0.25
    assert then[2] > total


@pytest.fixture
def packages(tmp_path: Path) -> Path:
    files = {
        "pyproject.toml": "[tool.drivetrain.minutes]\nintegration = 7\n",
        "core/pyproject.toml": '[project]\nname = "drivetrain"\n[tool.drivetrain]\nminutes = 6\n',
        "plugins/zero/pyproject.toml": '[project]\nname = "drivetrain-zero"\n',
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    return tmp_path


def test_a_package_declares_its_budget_or_has_three_minutes(packages: Path) -> None:
    assert workspace.budgets(packages) == {"core": 6, "zero": 3, "integration": 7}


def run_in_workspace(file: Path, *arguments: str) -> str:
    """Names of the tests that pytest runs with the settings of the workspace."""
    settings = ["-c", str(workspace.ROOT / "pyproject.toml"), "-p", "no:cacheprovider"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *settings, "-q", "--no-header", "-rp", *arguments, file],
        cwd=file.parent,
        capture_output=True,
        text=True,
        check=True,
    )
    return " ".join(line.partition("::")[2] for line in done.stdout.splitlines() if "::" in line)


def test_a_long_test_runs_only_where_long_tests_are_asked_for(tmp_path: Path) -> None:
    file = tmp_path / "test_of_two_lengths.py"
    file.write_text(
        "import pytest\ndef test_short(): pass\n@pytest.mark.long\ndef test_wide(): pass\n"
    )
    assert run_in_workspace(file) == "test_short"
    assert run_in_workspace(file, "-m", "not long") == "test_short"
    assert run_in_workspace(file, "-m", "long") == "test_wide"


def test_a_long_environment_has_the_settings_of_the_ordinary_one_and_its_own_tests(
    root: Path,
) -> None:
    command = [sys.executable, "-m", "tox", "config", "-k", "marks", "processes", "-e"]
    names = "core,long-core,long-integration,long-csv"
    env = {key: value for key, value in os.environ.items() if not key.startswith("TOX")}
    done = subprocess.run(
        [*command, names], cwd=root, env=env, capture_output=True, text=True, check=True
    )
    config = configparser.ConfigParser()
    config.read_string(done.stdout)
    found = {name: tuple(config[name].values()) for name in config.sections()}
    assert found == {
        "testenv:core": ("not long", "2"),
        "testenv:long-core": ("long", "2"),
        "testenv:long-integration": ("long", "2"),
        "testenv:long-csv": ("long", "0"),
    }
