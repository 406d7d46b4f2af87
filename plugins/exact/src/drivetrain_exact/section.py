"""The config section ``exact``."""

from __future__ import annotations

from pydantic import Field

from drivetrain.contracts import Bool, PositiveInt, Section

PATH = "exact"


class ExactSection(Section):
    """End with the same bits on any number of ranks, accumulation steps and ZeRO stage."""

    enabled: Bool = Field(default=True, description="Compute exactly, or refuse by name.")
    threads: PositiveInt = Field(
        default=1,
        description="Threads that each rank computes with on a host: how a matrix product is cut "
        "into sums depends on them, so they are the same on every layout.",
    )
    headroom: PositiveInt = Field(
        default=8,
        le=24,
        description="By how many powers of two a gradient may grow beyond the norm of the step "
        "before; beyond that the step is skipped. Each takes one bit from what is summed.",
    )
