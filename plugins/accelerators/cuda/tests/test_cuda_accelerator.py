"""NVIDIA GPUs as a job finds them; stand-ins take the place of the driver."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from drivetrain_cuda import accelerator as module
from drivetrain_cuda.accelerator import CudaAccelerator
from drivetrain_cuda.presence import why_absent

from drivetrain.errors import ConfigError
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.testing import AcceleratorConformance


class TestCuda(AcceleratorConformance):
    accelerator = CudaAccelerator


def driver(devices=1, status=0, missing=()):
    """A loader of stand-ins for the driver's libraries."""

    def count(target):
        ctypes.cast(target, ctypes.POINTER(ctypes.c_uint))[0] = devices
        return 0

    def load(name):
        if name in missing:
            raise OSError(f"{name}: cannot open shared object file")
        return SimpleNamespace(
            nvmlInit_v2=lambda: status, nvmlShutdown=lambda: 0, nvmlDeviceGetCount_v2=count
        )

    return load


def test_a_driver_with_devices_is_enough():
    assert why_absent({}, driver(8)) is None
    assert why_absent({"CUDA_VISIBLE_DEVICES": "3,5"}, driver(8)) is None
    assert why_absent({"CUDA_VISIBLE_DEVICES": "GPU-5e1f"}, driver(8)) is None


def test_a_driver_without_its_management_library_is_trusted():
    assert why_absent({}, driver(missing={"libnvidia-ml.so.1"})) is None


@pytest.mark.parametrize(
    ("environment", "load", "reason"),
    [
        ({}, driver(missing={"libcuda.so.1"}), "there is no NVIDIA driver (libcuda.so.1)"),
        ({}, driver(0), "the NVIDIA driver finds no device"),
        ({}, driver(1, status=9), "the NVIDIA driver finds no device"),
        ({"CUDA_VISIBLE_DEVICES": ""}, driver(), "CUDA_VISIBLE_DEVICES='' hides all devices"),
        ({"CUDA_VISIBLE_DEVICES": "-1"}, driver(), "CUDA_VISIBLE_DEVICES='-1' hides all devices"),
    ],
)
def test_the_probe_says_what_is_missing(environment, load, reason):
    assert why_absent(environment, load) == reason


def test_a_torch_without_cuda_is_said(monkeypatch):
    monkeypatch.setattr(module, "why_absent", lambda: None)
    monkeypatch.setattr(torch.version, "cuda", None)
    reason = "this torch is built without CUDA; install a build with it"
    assert CudaAccelerator().probe() == reason
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    assert CudaAccelerator().probe() is None


def test_a_job_that_asks_for_what_is_absent_is_refused_with_the_reason(monkeypatch):
    monkeypatch.setattr(module, "why_absent", lambda: "the NVIDIA driver finds no device")
    plan = Plan.build({"accelerator": "cuda"}, batch_required=False, world_size=1)
    with pytest.raises(ConfigError, match="which cannot be used here: the NVIDIA driver finds no"):
        Job.open(plan)


@pytest.mark.parametrize(
    ("capability", "dtypes"),
    [
        ((6, 1), (torch.float32,)),
        ((7, 5), (torch.float32, torch.float16)),
        ((8, 0), (torch.float32, torch.bfloat16, torch.float16)),
        ((10, 0), (torch.float32, torch.bfloat16, torch.float16)),
    ],
)
def test_dtypes_follow_from_the_compute_capability(capability, dtypes, monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert CudaAccelerator().supported_dtypes() == dtypes


def test_ranks_of_a_host_take_devices_in_turn(monkeypatch):
    started = []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    monkeypatch.setattr(torch.cuda, "set_device", started.append)
    accelerator = CudaAccelerator()
    assert accelerator.device(2) == torch.device("cuda", 2)
    assert accelerator.device(5) == torch.device("cuda", 1)
    accelerator.start(3, 4)
    assert started == [torch.device("cuda", 3)]


def test_tensors_in_host_memory_have_a_backend_too():
    assert CudaAccelerator().communication_backend() == "cpu:gloo,cuda:nccl"


def test_it_is_light_to_import():
    script = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from drivetrain_cuda.accelerator import CudaAccelerator\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


class Graphs:
    """Stands in for ``torch.cuda``: notes in which order a graph is made, and what is in it."""

    def __init__(self, refuses=False):
        self.log, self.refuses, self.inside = [], refuses, None

    def Stream(self):
        return SimpleNamespace(wait_stream=lambda other: self.log.append("aside waits"))

    def current_stream(self):
        return SimpleNamespace(wait_stream=lambda other: self.log.append("current waits"))

    def CUDAGraph(self):
        return SimpleNamespace(replay=lambda: self.log.append("replay"))

    @contextmanager
    def stream(self, stream):
        self.log.append("on the side")
        yield

    @contextmanager
    def graph(self, graph):
        self.log.append("captured")
        yield
        if self.refuses:
            raise RuntimeError("operation not permitted when stream is capturing")


def test_work_is_warmed_up_beside_and_then_captured(monkeypatch):
    graphs, ran = Graphs(), []
    monkeypatch.setattr(torch, "cuda", graphs)
    replay = CudaAccelerator().capture(lambda: ran.append(list(graphs.log)))
    assert ran == [["aside waits", "on the side"], [*graphs.log]]
    assert graphs.log == ["aside waits", "on the side", "current waits", "captured"]
    replay()
    assert graphs.log[-1] == "replay"
    assert len(ran) == 2


def test_work_that_a_graph_cannot_hold_is_not_captured(monkeypatch, caplog):
    monkeypatch.setattr(torch, "cuda", Graphs(refuses=True))
    caplog.set_level("INFO", "drivetrain.kernels")
    assert CudaAccelerator().capture(lambda: None) is None
    assert "not permitted when stream is capturing" in caplog.text
