"""``drivetrain new-plugin``: a package that works as it is made, and names that are refused."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from drivetrain import __version__
from drivetrain.cli import main
from drivetrain.contracts import Plugin
from drivetrain.plan.registry import Entry, Registry


class Good(Plugin):
    name = "good"


@pytest.fixture
def good(monkeypatch: pytest.MonkeyPatch) -> None:
    """A plugin that seems to be installed."""
    entry = Entry("plugins", "good", "drivetrain-good", "0.2", f"{__name__}:Good")
    everything = Registry([*Registry.installed()._entries, entry])
    monkeypatch.setattr(Registry, "installed", classmethod(lambda cls: everything))


def drivetrain(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.fixture(params=["plugin", "optimizer"])
def made(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, Path, dict[str, str]]:
    """A package as it is made, installed: what it is, its folder, and an environment."""
    options = ["--optimizer"] if request.param == "optimizer" else []
    result = drivetrain("new-plugin", "loss-alarm", *options, "--into", tmp_path / "made")
    assert result.exit_code == 0, result.output
    install = ["install", "--quiet", "--no-deps", "--no-index", "--no-build-isolation"]
    target = str(tmp_path / "installed")
    pip = [sys.executable, "-m", "pip", *install, "--target", target, str(tmp_path / "made")]
    subprocess.run(pip, check=True)
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([target, *sys.path])}
    return request.param, tmp_path / "made", environment


def test_a_new_package_passes_its_own_tests_as_made(made: tuple[str, Path, dict[str, str]]) -> None:
    kind, folder, environment = made
    pytest_command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests"]
    done = subprocess.run(
        pytest_command, cwd=folder, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert f"{10 if kind == 'plugin' else 9} passed" in done.stdout
    listing = [sys.executable, "-m", "drivetrain.cli", "plugins", "--json"]
    shown = subprocess.run(listing, env=environment, capture_output=True, text=True, check=True)
    name = "loss_alarm" if kind == "plugin" else "LossAlarm"
    row = next(row for row in json.loads(shown.stdout) if name in row["names"])
    assert row["distribution"] == "drivetrain-loss-alarm"
    assert kind == "optimizer" or row["hooks"] == ["step_end"]


@pytest.mark.parametrize(
    ("name", "owner"),
    [
        ("adam-w", "drivetrain-kernels"),
        ("mu-adam", "drivetrain-optimizers"),
        ("adamax", "torch.optim"),
    ],
)
def test_an_optimizer_that_exists_is_refused(name: str, owner: str, tmp_path: Path) -> None:
    result = drivetrain("new-plugin", name, "--optimizer", "--into", tmp_path / "made")
    assert result.exit_code == 2
    # The command line alone knows the names of packages that are not there, too.
    assert f"is served by {owner}" in result.stderr or "is served by drivetrain;" in result.stderr


def test_a_new_plugin_is_locked_to_this_version_of_core(tmp_path: Path) -> None:
    drivetrain("new-plugin", "loss_alarm", "--into", tmp_path / "made")
    major, minor, _ = __version__.split(".")
    wanted = f'["drivetrain>={major}.{minor},<{major}.{int(minor) + 1}"]'
    assert wanted in (tmp_path / "made" / "pyproject.toml").read_text()


@pytest.mark.parametrize("name", ["Loss", "2fast", "a..b", "a-", "../up", ""])
def test_a_name_that_is_no_package_name_is_refused(name: str, tmp_path: Path) -> None:
    result = drivetrain("new-plugin", "--into", tmp_path / "made", "--", name)
    assert result.exit_code == 2
    assert "is no name for a plugin" in result.stderr
    assert not (tmp_path / "made").exists()


@pytest.mark.parametrize(
    ("name", "owner"),
    [("good", "drivetrain-good"), ("zero-optimization", "drivetrain-zero"), ("fp16", "drivetrain")],
)
def test_a_section_that_is_served_already_is_refused(good, name, owner, tmp_path: Path) -> None:
    result = drivetrain("new-plugin", name, "--into", tmp_path / "made")
    assert result.exit_code == 2
    assert f"is served by {owner}; take another name" in result.stderr


def test_a_folder_in_use_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "mine.txt").write_text("precious")
    result = drivetrain("new-plugin", "alarm", "--into", tmp_path)
    assert result.exit_code == 2
    assert "is not an empty folder" in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["mine.txt"]


def test_a_folder_that_cannot_be_written_is_one_message(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    result = drivetrain("new-plugin", "alarm", "--into", tmp_path / "file" / "made")
    assert result.exit_code == 2
    assert "cannot be written: Not a directory" in result.stderr
