"""The collectives under the sanitizers (thread, address, undefined), with threads for ranks."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from drivetrain_cpu.kernels import NATIVE
from drivetrain_kernels.native import CXX

HERE = Path(__file__).parent


@pytest.fixture(scope="module")
def programs(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitized")
    made = {}
    for name in ("thread", "address,undefined"):
        made[name] = folder / name.replace(",", "-")
        command = [
            *CXX.command(),
            "-std=c++17",
            "-O1",
            "-g",
            "-pthread",
            f"-fsanitize={name}",
            "-fno-sanitize-recover=all",
            str(HERE / "collectives_in_threads.cpp"),
            str(NATIVE / "shared_group.cpp"),
            "-o",
            str(made[name]),
        ]
        built = subprocess.run(command, capture_output=True, text=True)
        if "cannot find" in built.stderr:
            pytest.skip(f"the compiler has no {name} sanitizer")
        assert built.returncode == 0, built.stderr
    return made


@pytest.mark.parametrize("ranks", ["2", "4"])
@pytest.mark.parametrize("sanitizer", ["thread", "address,undefined"])
def test_ranks_share_memory_without_races_or_overruns(programs, sanitizer, ranks):
    found = subprocess.run([programs[sanitizer], ranks], capture_output=True, text=True)
    assert found.stdout.strip() == "fine", found.stderr[-3000:]
    assert found.returncode == 0


def test_the_sanitizer_notices_a_rank_that_does_not_wait(programs):
    command = [programs["thread"], "2", "race"]
    found = subprocess.run(command, capture_output=True, text=True)
    assert "data race" in found.stderr
    assert found.returncode != 0
