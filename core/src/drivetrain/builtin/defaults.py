"""What happens when no plugin takes over: plain data parallelism on the device."""

from __future__ import annotations

from pydantic import Field

from drivetrain.builtin.base import Builtin
from drivetrain.plugin import Section
from drivetrain.section import Bool, PositiveInt

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


class Defaults(Builtin):
    """Core's own answers to the hooks of a job and an engine."""

    name = "defaults"
    sections = {"data_parallel": DataParallel}
