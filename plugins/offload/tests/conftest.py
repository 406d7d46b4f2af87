"""Fixtures of the tests of files."""

from __future__ import annotations

import os
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
from drivetrain_offload.file_io import AsyncFile
from drivetrain_offload.file_io.faults import Faults
from file_io_engines import ENGINES, without_compiler

from drivetrain.errors import ConfigError


@pytest.fixture(autouse=True)
def faultless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Faults, "planned", [])


@pytest.fixture(params=ENGINES)
def engine(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """The ``engine`` setting that leads to each implementation."""
    if request.param == "python":
        without_compiler(monkeypatch)
        return "auto"
    try:
        AsyncFile(os.devnull, engine=request.param).close()
    except ConfigError as error:
        pytest.skip(str(error))
    return request.param


@pytest.fixture
def tiny_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of one MiB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "drivetrain-test", str(folder)]
    try:
        mounted = subprocess.run(command, capture_output=True, check=False).returncode == 0
    except OSError:
        mounted = False
    if not mounted:
        pytest.skip("this user cannot mount file systems")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)
