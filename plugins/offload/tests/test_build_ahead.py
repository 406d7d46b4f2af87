"""``drivetrain build`` compiles the engine that reads and writes files, too."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from click.testing import CliRunner
from drivetrain_kernels import command
from drivetrain_kernels.native import CXX
from drivetrain_kernels.provider import load_providers
from drivetrain_kernels.registry import registry
from drivetrain_offload.file_io.native_engine import native_library

READ = """
from drivetrain_offload.file_io import AsyncFile
from drivetrain_offload.file_io.native_engine import native_library
AsyncFile("/dev/null").close()
print(native_library().origin)
"""


@pytest.fixture
def only_ours(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """Leave kernels of other packages out, and begin with an empty cache."""
    if not CXX.found():
        pytest.skip("there is no C++ compiler")
    ours = [each for each in load_providers("cpu") if each.distribution == "drivetrain-offload"]
    monkeypatch.setattr(registry, "providers", lambda device_type: ours)
    monkeypatch.setattr(command, "served_device_types", lambda: ["cpu"])
    monkeypatch.setenv("DRIVETRAIN_CACHE", str(tmp_path))
    return tmp_path


def test_the_engine_of_files_is_built_ahead_of_time(only_ours: Path) -> None:
    result = CliRunner().invoke(command.build, [])
    assert result.exit_code == 0, result.output
    assert "drivetrain_file_io: built drivetrain_file_io" in result.output
    environment = {**os.environ, "DRIVETRAIN_CACHE": str(only_ours)}
    done = subprocess.run(
        [sys.executable, "-c", READ], env=environment, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "cached drivetrain_file_io"


def test_it_can_be_shipped(only_ours: Path) -> None:
    result = CliRunner().invoke(command.build, ["--all", "--output", str(only_ours / "wheel")])
    assert result.exit_code == 0, result.output
    (shipped,) = (only_ours / "wheel").iterdir()
    assert shipped.name.startswith("drivetrain_file_io-")


def test_it_is_no_kernel(only_ours: Path) -> None:
    (ours,) = registry.providers("cpu")
    assert not ours.offers
    assert ours.used == [native_library()]
