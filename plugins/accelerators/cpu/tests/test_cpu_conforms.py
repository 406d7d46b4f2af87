"""The accelerator satisfies the conformance kit, with bound cores and without shared memory too."""

from __future__ import annotations

from drivetrain_cpu.accelerator import CpuAccelerator

from drivetrain.testing import AcceleratorConformance


class TestCpu(AcceleratorConformance):
    accelerator = CpuAccelerator


class TestBoundCpuOverGloo(AcceleratorConformance):
    accelerator = CpuAccelerator
    config = {"cpu": {"bind_cores": True, "threads": 1, "shared_memory": False}}
