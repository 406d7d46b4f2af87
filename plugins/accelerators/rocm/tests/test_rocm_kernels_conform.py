"""The kernels satisfy the operators' conformance kit on an AMD GPU."""

from __future__ import annotations

import pytest
from drivetrain_kernels import ops
from drivetrain_rocm.accelerator import RocmAccelerator

from drivetrain.testing.kernels import KernelConformance

if (absent := RocmAccelerator().probe()) is not None:
    pytest.skip(absent, allow_module_level=True)


class TestRocmKernels(KernelConformance):
    ops = (*ops("training"), *ops("attention"))
    device = "cuda"
    provider = "drivetrain-rocm"
