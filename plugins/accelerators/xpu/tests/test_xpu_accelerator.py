"""Intel GPUs as a job finds them; a folder takes the place of the driver's files."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from drivetrain_kernels import Provider
from drivetrain_kernels.triton_kernels import OPS
from drivetrain_xpu import accelerator as module
from drivetrain_xpu import kernels
from drivetrain_xpu.accelerator import XpuAccelerator
from drivetrain_xpu.presence import why_absent

from drivetrain.errors import ConfigError
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.testing import AcceleratorConformance


class TestXpu(AcceleratorConformance):
    accelerator = XpuAccelerator


@pytest.fixture
def machine(tmp_path):
    """A machine with a GPU of Intel and one of somebody else."""
    for node, vendor in (("renderD128", "0x1002"), ("renderD129", "0x8086")):
        device = tmp_path / "sys/class/drm" / node / "device"
        device.mkdir(parents=True)
        (device / "vendor").write_text(f"{vendor}\n")
        (tmp_path / "dev/dri").mkdir(parents=True, exist_ok=True)
        (tmp_path / "dev/dri" / node).touch()
    return tmp_path


def loaded(name):
    return name


def test_a_loader_and_a_device_are_enough(machine):
    assert why_absent({}, machine, loaded) is None
    assert why_absent({"ZE_AFFINITY_MASK": "0,1"}, machine, loaded) is None


def test_a_machine_without_level_zero_says_so(machine):
    def load(name):
        raise OSError(name)

    reason = "there is no Level Zero loader (libze_loader.so.1)"
    assert why_absent({}, machine, load) == reason


def test_a_machine_with_other_gpus_alone_says_so(machine):
    (machine / "sys/class/drm/renderD129/device/vendor").write_text("0x10de\n")
    assert why_absent({}, machine, loaded) == "there is no Intel GPU with a driver"


def test_a_device_that_one_may_not_use_says_so(machine, monkeypatch):
    monkeypatch.setattr(os, "access", lambda *arguments: False)
    reason = "this user may not use /dev/dri/renderD129; add it to the group render"
    assert why_absent({}, machine, loaded) == reason


def test_hidden_devices_are_said(machine):
    reason = "ZE_AFFINITY_MASK='' hides all devices"
    assert why_absent({"ZE_AFFINITY_MASK": ""}, machine, loaded) == reason


def test_a_torch_without_xpu_is_said(monkeypatch):
    monkeypatch.setattr(module, "why_absent", lambda: None)
    monkeypatch.setattr(torch.version, "xpu", None)
    reason = "this torch is built without XPU; install a build with it"
    assert XpuAccelerator().probe() == reason


def test_a_job_that_asks_for_what_is_absent_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(module, "why_absent", lambda: "there is no Intel GPU with a driver")
    plan = Plan.build({"accelerator": "xpu"}, batch_required=False, world_size=1)
    with pytest.raises(ConfigError, match="which cannot be used here: there is no Intel GPU with"):
        Job.open(plan)


@pytest.mark.parametrize(("native", "count"), [(True, 3), (False, 2)])
def test_bfloat16_is_claimed_where_the_device_has_it(native, count, monkeypatch):
    monkeypatch.setattr(torch.xpu, "is_bf16_supported", lambda including_emulation: native)
    dtypes = XpuAccelerator().supported_dtypes()
    assert len(dtypes) == count
    assert (torch.bfloat16 in dtypes) == native


def test_tensors_in_host_memory_have_a_backend_too():
    assert XpuAccelerator().communication_backend() == "cpu:gloo,xpu:xccl"


def test_it_offers_what_is_written_in_triton_and_imports_none_of_it():
    provider = Provider("drivetrain-xpu", "0", "xpu")
    kernels.register(provider)
    assert set(provider.offers) == set(OPS)
    assert provider.libraries == []
    assert "drivetrain_kernels.triton_kernels.launch" not in sys.modules


def test_it_is_light_to_import():
    script = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from drivetrain_xpu.accelerator import XpuAccelerator\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0
