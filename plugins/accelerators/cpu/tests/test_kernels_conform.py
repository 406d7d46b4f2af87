"""The native CPU kernels satisfy the operators' conformance kit."""

from __future__ import annotations

import torch
from drivetrain_cpu.instruction_sets import selected
from drivetrain_kernels import dequantize, implementations, ops, quantize
from drivetrain_kernels.report import report_rows

from drivetrain.testing.kernels import KernelConformance


class TestNativeKernels(KernelConformance):
    ops = ops()
    provider = "drivetrain-cpu"


def test_float64_is_left_to_the_reference():
    values = torch.randn(100, generator=torch.Generator().manual_seed(0))
    codes, scales = quantize(values, "int8", block=10)
    found = dequantize(codes, scales, "int8", numel=100, block=10, dtype=torch.float64)
    assert found.dtype == torch.float64
    near = dequantize(codes, scales, "int8", numel=100, block=10)
    torch.testing.assert_close(found, near.double())


def test_the_report_names_the_kernels_that_calls_reach():
    rows = [
        row for row in report_rows("cpu") if row[0].startswith("kernels for cpu: drivetrain-cpu")
    ]
    said = ", ".join(text for _, text in rows)  # one row of what was built, one of what was there
    assert f"drivetrain_cpu_{selected().name}" in said
    for found in implementations(["cpu"]):
        assert found.op in said
