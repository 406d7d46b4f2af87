"""Plugins by somebody else in ``examples/``: installed with pip, and tested by their own tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

OFFLINE = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")


@pytest.fixture(scope="module")
def installed(root: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """The environment of a process that finds the package of ``examples/noise_scale``."""
    target = tmp_path_factory.mktemp("installed")
    example = root / "examples" / "noise_scale"
    install = [sys.executable, "-m", "pip", "install", *OFFLINE, "--target", target, example]
    subprocess.run(install, check=True)
    path = os.pathsep.join([str(target), *sys.path])
    theirs = {k: v for k, v in os.environ.items() if not k.startswith("PYTEST")}
    return {**theirs, "PYTHONPATH": path, "COLUMNS": "200"}


def python(environment: dict[str, str], *arguments: object) -> str:
    done = subprocess.run(
        [sys.executable, *map(str, arguments)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_its_own_tests_pass_with_the_kits(installed: dict[str, str], root: Path) -> None:
    tests = root / "examples" / "noise_scale" / "tests"
    options = ("-q", "-n0", "-p", "no:cacheprovider", "--rootdir", tests)
    assert " passed" in python(installed, "-m", "pytest", *options, tests)


def test_the_kit_runs_from_the_shell(installed: dict[str, str]) -> None:
    """As the README shows it, after ``pip install examples/noise_scale``."""
    shown = python(installed, "-m", "drivetrain.cli", "test-plugin", "gradient_noise_scale")
    assert "plugin 'gradient_noise_scale' (noise-scale-drivetrain" in shown


def test_an_engine_has_its_method_and_fp16_is_refused_by_name(
    installed: dict[str, str], tmp_path: Path
) -> None:
    config = tmp_path / "job.json"
    config.write_text('{"train_batch_size": 2, "gradient_noise_scale": {}, "fp16": {}}')
    check = ("-m", "drivetrain.cli", "config", "check", config)
    assert "is valid" in python(installed, *check)
    done = subprocess.run(
        [sys.executable, *map(str, check), "--set", "fp16.enabled=true"],
        env=installed,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "a loss scale that changes between steps" in done.stderr
    assert "NoiseScale" in python(
        installed,
        "-c",
        "from drivetrain.plan.registry import Registry as R;"
        "print(R.installed().find('plugins', 'gradient_noise_scale').load());"
        "assert R.installed().find('methods', 'gradient_noise_scale')",
    )
