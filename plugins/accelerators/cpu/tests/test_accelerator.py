"""The accelerator as a job finds it, its section, and its memory statistics."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from drivetrain_cpu import memory
from drivetrain_cpu.accelerator import CpuAccelerator
from drivetrain_cpu.plugin import Cpu
from drivetrain_cpu.shared_memory import SharedMemoryCommunicator, native_library

from drivetrain.contracts import Purpose, Tag
from drivetrain.errors import ConfigError
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.testing import PluginConformance, RanksFailedError, run_distributed

MIB = 2**20


class TestSection(PluginConformance):
    plugin = Cpu
    config = {"cpu": {"bind_cores": True, "threads": 2, "shared_memory": False}}


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"threads": 0}, "cpu.threads"),
        ({"threads": "many"}, "cpu.threads"),
        ({"bind_cores": "yes"}, "cpu.bind_cores"),
        ({"bind_cores": 1}, "cpu.bind_cores"),
        ({"shared_memory": "auto ", "thread": 1}, "cpu.thread"),
    ],
)
def test_wrong_values_are_refused_by_their_path(section, message):
    with pytest.raises(ConfigError, match=message):
        Plan.build({"cpu": section}, batch_required=False)


def test_it_takes_the_place_of_cores_own_host():
    plan = Plan.build({"accelerator": "cpu"}, batch_required=False, world_size=1)
    with Job.open(plan) as job:
        assert isinstance(job.accelerator, CpuAccelerator)
        assert job.device == torch.device("cpu")


def test_it_is_light_to_import_and_probe():
    script = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from drivetrain_cpu.accelerator import CpuAccelerator\n"
        "assert CpuAccelerator().probe() is None\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == 0


def test_memory_rises_falls_and_its_peak_is_kept_until_reset():
    accelerator = CpuAccelerator()
    before = accelerator.memory_allocated()
    held = torch.ones(64 * MIB, dtype=torch.uint8)
    assert accelerator.memory_allocated() - before > 50 * MIB
    del held
    after = accelerator.memory_allocated()
    assert after - before < 32 * MIB
    assert accelerator.max_memory_allocated() - after > 30 * MIB
    if not memory.reset_peak():
        pytest.skip("this system keeps the peak of memory for the life of a process")
    accelerator.reset_peak_memory()
    assert accelerator.max_memory_allocated() - accelerator.memory_allocated() < 30 * MIB


def test_a_container_limits_the_memory(tmp_path):
    host = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = tmp_path / "memory.max"
    assert memory.total((limit,)) == host
    limit.write_text("max\n")
    assert memory.total((limit,)) == host
    limit.write_text(f"{64 * MIB}\n")
    assert memory.total((tmp_path / "none", limit)) == 64 * MIB
    limit.write_text(f"{2**62}\n")
    assert memory.total((limit,)) == host


def test_products_of_claimed_dtypes_are_right():
    dtypes = CpuAccelerator().supported_dtypes()
    assert dtypes[0] == torch.float32
    assert set(dtypes) <= {torch.float32, torch.bfloat16, torch.float16}
    one, other = torch.randn(2, 16, 16, dtype=torch.float64)
    for dtype in dtypes:
        product = one.to(dtype) @ other.to(dtype)
        assert torch.allclose(product.double(), one @ other, atol=0.2)


@pytest.fixture
def built():
    """Ranks find the kernels in the cache; compiling them takes longer than a rank may."""
    native_library()


def route(config: dict[str, object]) -> tuple[float, bool]:
    plan = Plan.build({"accelerator": "cpu", **config}, batch_required=False)
    with Job.open(plan) as job:
        x = torch.tensor([job.rank + 1.0])
        job.communicator.all_reduce(x, "world", Tag(Purpose.CONTROL))
        return x.item(), isinstance(job.byte_log.inner, SharedMemoryCommunicator)


def test_ranks_of_one_host_share_memory_unless_told_otherwise(built):
    assert run_distributed(route, 2, {}) == [(3.0, True)] * 2
    assert run_distributed(route, 2, {"cpu": {"shared_memory": False}}) == [(3.0, False)] * 2


def fails() -> None:
    job = Job.open(Plan.build({"accelerator": "cpu"}, batch_required=False))
    x = torch.ones(1)
    job.communicator.all_reduce(x, "world", Tag(Purpose.CONTROL))
    if job.rank == 1:
        raise ValueError("no more data")
    job.communicator.all_reduce(x, "world", Tag(Purpose.CONTROL))


def test_ranks_that_wait_in_shared_memory_fail_with_the_error_of_the_one_that_raised(built):
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(fails, 3)
    for rank in (0, 2):
        assert caught.value.errors[rank].error.endswith(
            "because rank 1 failed: ValueError: no more data"
        )
