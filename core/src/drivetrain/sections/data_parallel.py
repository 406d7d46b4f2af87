"""The section `data_parallel`."""

from __future__ import annotations

from pydantic import Field

from drivetrain.contracts.plugin.section import Bool, PositiveInt, Section

_MIB = 1024 * 1024


class DataParallel(Section):
    """Reduction of replicated gradients."""

    bucket_bytes: PositiveInt = Field(
        default=25 * _MIB, description="Gradients reduced by one call, in bytes (25 MiB)."
    )
    first_bucket_bytes: PositiveInt = Field(
        default=_MIB,
        description="The bucket that backward fills first, in bytes (1 MiB); a small one lets "
        "communication start early.",
    )
    overlap: Bool = Field(default=True, description="Reduce while backward goes on.")
