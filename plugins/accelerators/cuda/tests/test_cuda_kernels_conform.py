"""The kernels satisfy the operators' conformance kit on an NVIDIA GPU."""

from __future__ import annotations

import pytest
from drivetrain_cuda.accelerator import CudaAccelerator
from drivetrain_kernels import ops

from drivetrain.testing.kernels import KernelConformance

if (absent := CudaAccelerator().probe()) is not None:
    pytest.skip(absent, allow_module_level=True)


class TestCudaKernels(KernelConformance):
    ops = (*ops("training"), *ops("attention"))
    device = "cuda"
    provider = "drivetrain-cuda"
