"""The references satisfy the kit that they are the yardstick of."""

from __future__ import annotations

from drivetrain_kernels import ops

from drivetrain.testing.kernels import KernelConformance


class TestReferences(KernelConformance):
    ops = ops()
