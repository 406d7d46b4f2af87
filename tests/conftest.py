"""Integration tests: they need several distributions, or the repository itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))


@pytest.fixture(scope="session")
def root() -> Path:
    """The root of the repository."""
    return ROOT


@pytest.fixture(scope="session")
def with_lantern(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs Python where the third-party accelerator is installed beside all that is here.

    Takes arguments and environment variables, and answers what was printed.
    """
    target = tmp_path_factory.mktemp("lantern")
    offline = ("--quiet", "--no-deps", "--no-index", "--no-build-isolation")
    example = ROOT / "examples" / "third_party_accelerator"
    install = [sys.executable, "-m", "pip", "install", *offline, "--target", target, example]
    subprocess.run(install, check=True)
    theirs = {
        key: value
        for key, value in os.environ.items()
        if key == "DRIVETRAIN_CACHE" or not key.startswith(("PYTEST", "DRIVETRAIN_"))
    }
    path = os.pathsep.join([str(target), *sys.path])

    def run(*arguments: str, **environment: str) -> str:
        done = subprocess.run(
            [sys.executable, *arguments],
            cwd=target,
            env={**theirs, "PYTHONPATH": path, "COLUMNS": "500", **environment},
            capture_output=True,
            text=True,
            timeout=300,
            check=False,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return run
