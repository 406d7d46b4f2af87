"""Fixtures of the tests of files."""

from __future__ import annotations

import os

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
