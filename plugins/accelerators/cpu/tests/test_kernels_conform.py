"""The native CPU kernels satisfy the operators' conformance kit."""

from __future__ import annotations

from drivetrain_cpu.instruction_sets import selected
from drivetrain_kernels import implementations, ops
from drivetrain_kernels.report import report_rows

from drivetrain.testing.kernels import KernelConformance


class TestNativeKernels(KernelConformance):
    ops = ops()
    provider = "drivetrain-cpu"


def test_the_report_names_the_kernels_that_calls_reach():
    rows = dict(report_rows("cpu"))
    (label,) = [label for label in rows if label.startswith("kernels for cpu: drivetrain-cpu")]
    assert rows[label].startswith("adagrad, adam, add_rms_norm, block_linear, block_sparse_")
    assert f"drivetrain_cpu_{selected().name}" in rows[label]
    for found in implementations(["cpu"]):
        assert found.op in rows[label]
