"""Calls of kernels that are noted and made again; what else computes is not left out in silence."""

from __future__ import annotations

import logging

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
