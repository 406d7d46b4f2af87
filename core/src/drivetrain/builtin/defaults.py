"""What happens when no plugin takes over: plain data parallelism on the device."""

from __future__ import annotations

from typing import ClassVar

from pydantic import Field

from drivetrain.plugin import Plugin, Section, Sections
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


class Defaults(Plugin):
    """Core's own answers to the hooks of a job and an engine."""

    name = "defaults"
    sections: ClassVar[Sections] = {"data_parallel": DataParallel}
