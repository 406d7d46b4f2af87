"""AMD GPUs as a job finds them; a folder takes the place of the driver's files."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from drivetrain_rocm import accelerator as module
from drivetrain_rocm.accelerator import RocmAccelerator
from drivetrain_rocm.presence import count_devices, why_absent

from drivetrain.errors import ConfigError
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.testing import AcceleratorConformance


class TestRocm(AcceleratorConformance):
    accelerator = RocmAccelerator


@pytest.fixture
def machine(tmp_path):
    """A machine with one CPU node and two GPU nodes."""
    (tmp_path / "dev").mkdir()
    (tmp_path / "dev/kfd").touch()
    nodes = tmp_path / "sys/class/kfd/kfd/topology/nodes"
    for index, units in enumerate((0, 256, 304)):
        (nodes / str(index)).mkdir(parents=True)
        text = f"cpu_cores_count 0\nsimd_count {units}\nmem_banks_count 1\n"
        (nodes / str(index) / "properties").write_text(text)
    return tmp_path


def test_a_driver_with_devices_is_enough(machine):
    assert count_devices(machine) == 2
    assert why_absent({}, machine) is None
    assert why_absent({"HIP_VISIBLE_DEVICES": "1"}, machine) is None


def test_a_machine_without_the_driver_says_so(tmp_path):
    assert why_absent({}, tmp_path) == "there is no AMD GPU driver (/dev/kfd)"


def test_a_driver_without_devices_says_so(machine):
    for node in (1, 2):
        (machine / f"sys/class/kfd/kfd/topology/nodes/{node}/properties").write_text("simd_count 0")
    assert why_absent({}, machine) == "the AMD GPU driver finds no device"


def test_a_driver_that_one_may_not_use_says_so(machine, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    assert why_absent({}, machine) == "this user may not use /dev/kfd; add it to the group render"


@pytest.mark.parametrize("variable", ["ROCR_VISIBLE_DEVICES", "HIP_VISIBLE_DEVICES"])
def test_hidden_devices_are_said(machine, variable):
    assert why_absent({variable: ""}, machine) == f"{variable}='' hides all devices"


def test_a_torch_without_rocm_is_said(monkeypatch):
    monkeypatch.setattr(module, "why_absent", lambda: None)
    monkeypatch.setattr(torch.version, "hip", None)
    reason = "this torch is built without ROCm; install a build with it"
    assert RocmAccelerator().probe() == reason
    monkeypatch.setattr(torch.version, "hip", "7.0")
    assert RocmAccelerator().probe() is None


def test_a_job_that_asks_for_what_is_absent_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(module, "why_absent", lambda: "the AMD GPU driver finds no device")
    plan = Plan.build({"accelerator": "rocm"}, batch_required=False, world_size=1)
    with pytest.raises(ConfigError, match="which cannot be used here: the AMD GPU driver finds no"):
        Job.open(plan)


def test_torch_calls_the_devices_cuda(monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert RocmAccelerator().device(5) == torch.device("cuda", 1)
    assert RocmAccelerator().communication_backend() == "cpu:gloo,cuda:nccl"


def test_it_is_light_to_import():
    script = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from drivetrain_rocm.accelerator import RocmAccelerator\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
