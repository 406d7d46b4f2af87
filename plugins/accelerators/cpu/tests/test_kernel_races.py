"""The parallel loops of the kernels under the thread sanitizer."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
from drivetrain_cpu.instruction_sets import selected
from drivetrain_cpu.kernels import FLAGS
from drivetrain_kernels.native import CXX

HERE = Path(__file__).parent
SANITIZE = ("-fsanitize=thread", "-g", "-O1")


def built(folder, name, *others):
    """The program of one source, sanitised and linked with others in OpenMP's place."""
    kernels, made = folder / f"{name}.o", folder / name
    compiled = [*FLAGS, *selected().flags, *SANITIZE, "-c", HERE / f"{name}.cpp"]
    linked = [*SANITIZE, "-std=c++17", "-pthread", kernels, *others]
    for arguments, output in ((compiled, kernels), (linked, made)):
        done = subprocess.run(
            [*CXX.command(), *arguments, "-o", output], capture_output=True, text=True
        )
        if "cannot find" in done.stderr:
            pytest.skip("the compiler has no thread sanitizer")
        assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    # Linked without -fopenmp: its functions are ours.
    folder = tmp_path_factory.mktemp("sanitized")
    return built(folder, "kernels_in_threads", HERE / "openmp_over_threads.cpp")


@pytest.fixture(scope="module")
def team(tmp_path_factory):
    # It asks OpenMP for its places; none of its threads takes part.
    return built(tmp_path_factory.mktemp("sanitized"), "team_in_threads", "-fopenmp")


@pytest.mark.parametrize("name", ["program", "team"])
def test_threads_of_a_kernel_touch_different_memory(name, request):
    made = request.getfixturevalue(name)
    found = subprocess.run([made], capture_output=True, text=True, timeout=300)
    assert found.stdout.strip() == "fine", found.stderr[-3000:]
    assert found.returncode == 0


@pytest.mark.parametrize("name", ["program", "team"])
def test_the_sanitizer_notices_two_kernels_that_write_one_tensor(name, request):
    made = request.getfixturevalue(name)
    found = subprocess.run([made, "race"], capture_output=True, text=True, timeout=300)
    assert "data race" in found.stderr
    assert found.returncode != 0
