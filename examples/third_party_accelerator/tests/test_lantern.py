"""The package holds to what Drivetrain asks of an accelerator and of a kernel."""

from __future__ import annotations

import pytest
from drivetrain_kernels import ops
from lantern_drivetrain.accelerator import Lantern

from drivetrain.job.accelerator_choice import active
from drivetrain.testing import AcceleratorConformance
from drivetrain.testing.kernels import KernelConformance


class TestLantern(AcceleratorConformance):
    accelerator = Lantern


class TestLion(KernelConformance):
    ops = [op for op in ops() if op.name == "lion"]
    provider = "lantern-drivetrain"

    @pytest.fixture(autouse=True)
    def in_use(self):
        with active(Lantern()):
            yield
