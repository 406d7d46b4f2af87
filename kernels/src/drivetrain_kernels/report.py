"""What ``drivetrain report`` says of kernels."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import groupby

import torch

from drivetrain_kernels.registry import Implementation, registry

Rows = Sequence[tuple[str, str]]


def rows() -> Rows:
    """The table ``kernels``: every op on the host's memory and on the device that torch finds."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    device_types = dict.fromkeys(["cpu", *([found.type] if found is not None else [])])
    return [row for device_type in device_types for row in report_rows(device_type)]


def report_rows(device_type: str) -> Rows:
    """Which ops use which implementation on tensors of one device type, and why.

    Decides what no call has decided yet, so it may build native libraries: the report then tells
    what will run, not what might.

    Args:
        device_type: a torch device type.
    """

    def choice(found: Implementation) -> tuple[str, str]:
        return found.provider, found.reason

    answers = []
    for (provider, reason), same in groupby(
        sorted(registry.implementations([device_type]), key=choice), key=choice
    ):
        ops = ", ".join(found.op for found in same)
        answers.append((f"kernels for {device_type}: {provider}", f"{ops} ({reason})"))
    return answers
