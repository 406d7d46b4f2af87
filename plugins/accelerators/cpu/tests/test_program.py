"""Calls of kernels that are noted and made again; what else computes is not left out in silence."""

from __future__ import annotations

import logging
import os
import threading
from pathlib import Path

import pytest
import torch
from drivetrain_cpu.accelerator import CpuAccelerator
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


@pytest.mark.skipif(not TASKS.exists(), reason="the system does not list a process's threads")
def test_a_forked_process_has_threads_of_its_own(three_threads):
    replay, found, wanted = a_wide_layer(0)
    replay()
    child = os.fork()
    if not child:
        try:
            found.zero_()
            replay()
            right = torch.allclose(found, wanted, rtol=1e-4, atol=1e-4)
            os._exit(0 if right and len(list(TASKS.iterdir())) == 3 else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
