"""The Triton kernels satisfy the conformance kit in Triton's interpreter, and compile for GPUs."""

from __future__ import annotations

import os
import subprocess
import sys
from itertools import islice
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("needs TRITON_INTERPRET=1 before triton is imported", allow_module_level=True)
pytest.importorskip("triton", reason="triton is not installed")

from drivetrain_kernels import Provider, ops
from drivetrain_kernels.triton_kernels import OPS, triton_kernel
from in_place import in_place

from drivetrain.testing.kernels import KernelConformance

# The interpreter computes with numpy, which warns of infinities.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning")


@pytest.fixture(scope="module", autouse=True)
def interpreted():
    provider = Provider("interpreted", "0", "cpu")
    for op in OPS:
        provider.implement_later(op, triton_kernel(op))
    with in_place(provider):
        yield


WRITTEN = [op for op in ops() if op.name in OPS]


class TestTritonKernels(KernelConformance):
    ops = WRITTEN
    provider = "interpreted"

    def _examples(self, op):
        # The interpreter is slow; below, every example is compared with the reference.
        return islice(super()._examples(op), 0, None, 4)


@pytest.mark.parametrize("op", WRITTEN, ids=lambda op: op.name)
def test_every_example_matches_the_reference(op):
    KernelConformance().test_matches_the_float64_reference(op)


@pytest.mark.parametrize("target", ["cuda 90 32", "cuda 100 32", "hip gfx942 64"])
def test_they_compile_for_devices_that_are_not_here(target, tmp_path):
    program = Path(__file__).with_name("compile_triton_kernels.py")
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, program, *target.split()],
        env={**environment, "TRITON_CACHE_DIR": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    binaries = [path for path in tmp_path.rglob("*") if path.suffix in (".cubin", ".hsaco")]
    assert len(binaries) == int(done.stdout.split()[-1]) > 20
