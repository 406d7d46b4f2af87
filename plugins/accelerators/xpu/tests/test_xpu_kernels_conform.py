"""The kernels satisfy the operators' conformance kit on an Intel GPU."""

from __future__ import annotations

import pytest
from drivetrain_kernels import ops
from drivetrain_kernels.triton_kernels import OPS
from drivetrain_xpu.accelerator import XpuAccelerator

from drivetrain.testing.kernels import KernelConformance

if (absent := XpuAccelerator().probe()) is not None:
    pytest.skip(absent, allow_module_level=True)


class TestXpuKernels(KernelConformance):
    ops = [op for op in ops() if op.name in OPS]
    device = "xpu"
    provider = "drivetrain-xpu"
