"""Calls of kernels that are noted and made again; what else computes is not left out in silence."""

from __future__ import annotations

import ctypes
import logging
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from drivetrain_cpu.accelerator import CpuAccelerator
from drivetrain_cpu.instruction_sets import selected
from drivetrain_cpu.kernels import kernel_library, program
from drivetrain_kernels import pack_panels
from drivetrain_kernels.ops.decoder import ADD_RMS_NORM, GATED_ACTIVATION
from drivetrain_kernels.ops.linear import PACKED_LINEAR
from drivetrain_kernels.registry import REFERENCE

pytestmark = pytest.mark.skipif(
    PACKED_LINEAR.provider("cpu") == REFERENCE, reason="the CPU's kernels are not built"
)


TASKS = Path("/proc/self/task")


def a_layer(generator):
    """A small chain of kernels over memory of its own: what it reads, and what runs it."""
    x = torch.randn(3, 16, generator=generator)
    weight = torch.randn(64, 16, generator=generator)
    scale, panels = torch.ones(16), pack_panels(weight)
    norm, product = ADD_RMS_NORM.function("cpu"), PACKED_LINEAR.function("cpu")
    gate, found = GATED_ACTIVATION.function("cpu"), []

    def run():
        found[:] = [gate(product(norm(x, None, scale, 1e-6), panels, None, 64), "silu")]

    return x, run, found


def test_what_is_repeated_reads_and_writes_the_same_memory():
    x, run, found = a_layer(torch.Generator().manual_seed(0))
    replay = CpuAccelerator().capture(run)
    captured = found[0]
    for seed in (1, 2):
        x.copy_(torch.randn(3, 16, generator=torch.Generator().manual_seed(seed)))
        replay()
        result = captured.clone()
        run()
        assert torch.equal(result, found[0])


def test_a_function_that_computes_by_torch_is_not_repeated(caplog):
    x, run, _ = a_layer(torch.Generator().manual_seed(0))
    caplog.set_level(logging.INFO, "drivetrain.cpu")

    def also_adds():
        run()
        x.add_(1)

    assert CpuAccelerator().capture(also_adds) is None
    assert "aten::add_ is computed by torch" in caplog.text


def test_nothing_is_noted_after_an_error():
    x, run, _ = a_layer(torch.Generator().manual_seed(0))

    def fails():
        run()
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        CpuAccelerator().capture(fails)
    run()
    assert x.add(1) is not None
    assert CpuAccelerator().capture(run) is not None


@pytest.fixture
def three_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    torch.set_num_threads(before)


def a_wide_layer(seed):
    """A repeated product that three threads share out, its result, and what it has to be."""
    generator = torch.Generator().manual_seed(seed)
    x, weight = (torch.randn(n, 64, generator=generator) for n in (2, 4096))
    panels, product, found = pack_panels(weight), PACKED_LINEAR.function("cpu"), []
    replay = CpuAccelerator().capture(lambda: found.append(product(x, panels, None, 4096)))
    return replay, found[0], (x.double() @ weight.double().t()).float()


def test_calls_of_two_threads_at_once_do_not_meet(three_threads):
    layers = [a_wide_layer(seed) for seed in (0, 1)]
    for _, found, _ in layers:
        found.zero_()
    both = [threading.Thread(target=lambda r=r: [r() for _ in range(300)]) for r, _, _ in layers]
    for each in both:
        each.start()
    for each in both:
        each.join()
    for _, found, wanted in layers:
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)


def in_a_fork(body):
    """Whether ``body`` returns true in a fork of this process, where no team has threads yet."""
    child = os.fork()
    if not child:
        try:
            os._exit(0 if body() else 1)
        finally:
            os._exit(2)
    return os.waitpid(child, 0)[1] == 0


def number_of_threads():
    return len(list(TASKS.iterdir()))


needs_tasks = pytest.mark.skipif(
    not TASKS.exists(), reason="the system does not list a process's threads"
)


@needs_tasks
def test_a_forked_process_has_threads_of_its_own(three_threads):
    replay, found, wanted = a_wide_layer(0)
    replay()

    def replays():
        found.zero_()
        replay()
        return torch.allclose(found, wanted, rtol=1e-4, atol=1e-4) and number_of_threads() == 3

    assert in_a_fork(replays)


@needs_tasks
def test_a_process_forked_while_another_thread_has_the_team_has_threads_too(three_threads):
    replay, _, _ = a_wide_layer(0)
    inside, leave = threading.Event(), threading.Event()

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p)
    def waits(_):
        inside.set()
        leave.wait(60)
        return 0

    call = program._Call(ctypes.cast(waits, ctypes.c_void_p), None)
    run = kernel_library(selected()).load().dt_run
    other = threading.Thread(target=run, args=(ctypes.byref(call), 1, 3))
    other.start()
    assert inside.wait(60)

    def replays():
        replay()
        return number_of_threads() == 3

    try:
        assert in_a_fork(replays)
    finally:
        leave.set()
        other.join()


@needs_tasks
def test_all_kernels_have_one_team(three_threads):
    x = torch.randn(64, 2048, generator=torch.Generator().manual_seed(0))
    scale, weight = torch.ones(2048), x.t().contiguous()
    norm, gate = ADD_RMS_NORM.function("cpu"), GATED_ACTIVATION.function("cpu")
    product, few = PACKED_LINEAR.function("cpu"), x[:, :64].contiguous()
    inputs = [few, few.bfloat16()]
    panels = [pack_panels(weight.to(each.dtype)) for each in inputs]

    def kernels_one_by_one():
        norm(x, None, scale, 1e-6)
        gate(x, "silu")
        for each, packed in zip(inputs, panels, strict=True):
            product(each, packed, None, 2048)

    def uses_two_more_threads():
        kernels_one_by_one()
        return number_of_threads() == 3

    kernels_one_by_one()
    assert in_a_fork(uses_two_more_threads)


BOUND = """
import os
allowed = os.sched_getaffinity(0)
import torch  # loads OpenMP, which binds this thread
from drivetrain_cpu.instruction_sets import selected
from drivetrain_cpu.kernels import kernel_library
run = kernel_library(selected()).load().dt_run
assert len(os.sched_getaffinity(0)) == 1
before = set(os.listdir("/proc/self/task"))
assert run(None, 0, 3) == 0
helpers = set(os.listdir("/proc/self/task")) - before
assert len(helpers) == 2
while not all(os.sched_getaffinity(int(helper)) == allowed for helper in helpers):
    pass
"""


@needs_tasks
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="needs two cores")
def test_threads_of_the_team_are_not_bound_to_the_core_of_the_first_thread():
    environment = {**os.environ, "OMP_PROC_BIND": "true", "OMP_PLACES": "cores"}
    done = subprocess.run(
        [sys.executable, "-c", BOUND], env=environment, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
