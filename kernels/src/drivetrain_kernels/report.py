"""Lines of ``drivetrain report`` on kernels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

from drivetrain_kernels.registry import Implementation, registry


def report_rows(device_type: str) -> Sequence[tuple[str, str]]:
    """For ``report_rows`` of an accelerator: which ops use which implementation, and why.

    Decides what no call has decided yet, so it may build native libraries: the report then tells
    what will run, not what might.

    Args:
        device_type: the accelerator's torch device type.
    """

    def choice(found: Implementation) -> tuple[str, str]:
        return found.provider, found.reason

    rows = []
    for (provider, reason), same in groupby(
        sorted(registry.implementations([device_type]), key=choice), key=choice
    ):
        ops = ", ".join(found.op for found in same)
        rows.append((f"kernels for {device_type}: {provider}", f"{ops} ({reason})"))
    return rows
