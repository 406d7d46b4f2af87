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


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sanitized")
    kernels, made = folder / "kernels.o", folder / "kernels"
    compiled = [*FLAGS, *selected().flags, *SANITIZE, "-c", HERE / "kernels_in_threads.cpp"]
    # Linked without -fopenmp: its functions are ours.
    linked = [*SANITIZE, "-std=c++17", "-pthread", kernels, HERE / "openmp_over_threads.cpp"]
    for arguments, output in ((compiled, kernels), (linked, made)):
        built = subprocess.run(
            [*CXX.command(), *arguments, "-o", output], capture_output=True, text=True
        )
        if "cannot find" in built.stderr:
            pytest.skip("the compiler has no thread sanitizer")
        assert built.returncode == 0, built.stderr
    return made


def test_threads_of_a_kernel_touch_different_memory(program):
    found = subprocess.run([program], capture_output=True, text=True, timeout=300)
    assert found.stdout.strip() == "fine", found.stderr[-3000:]
    assert found.returncode == 0


def test_the_sanitizer_notices_two_kernels_that_write_one_tensor(program):
    found = subprocess.run([program, "race"], capture_output=True, text=True, timeout=300)
    assert "data race" in found.stderr
    assert found.returncode != 0
