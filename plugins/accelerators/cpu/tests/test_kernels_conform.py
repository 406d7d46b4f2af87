"""The native CPU kernels satisfy the operators' conformance kit."""

from __future__ import annotations

from drivetrain_kernels import ops

from drivetrain.testing.kernels import KernelConformance


class TestNativeKernels(KernelConformance):
    ops = ops()
    provider = "drivetrain-cpu"
