"""What ``drivetrain report`` says of the memory that states can be moved to."""

from __future__ import annotations

from collections.abc import Iterator

from drivetrain_offload.host.memory import available_bytes, lockable, total_bytes

_GIB = 1 << 30


def report_memory() -> Iterator[tuple[str, str]]:
    """Rows of the table ``memory``."""
    for label, nbytes in (("host", total_bytes()), ("available", available_bytes())):
        yield label, "unknown" if nbytes is None else f"{nbytes / _GIB:,.1f} GiB"
    yield "limit of locked pages", lockable()
    yield "by kind and place", "before a job runs: drivetrain report --memory --config FILE"
    yield (
        "by kind and place",
        'in a running job: "memory_breakdown": true, or drivetrain_offload.memory_table(engine)',
    )
