"""The config section ``verify``."""

from __future__ import annotations

from pydantic import Field

from drivetrain.contracts import Bool, PositiveFloat, PositiveInt, Section

PATH = "verify"


class VerifySection(Section):
    """Compare the first steps with plain torch in one process."""

    enabled: Bool = Field(default=True, description="Compare.")
    steps: PositiveInt = Field(default=5, description="Steps that are compared.")
    factor: PositiveFloat = Field(
        default=8.0,
        description="How many times the rounding error of plain torch in the same precision a "
        "parameter may be off.",
    )
    stop: Bool = Field(
        default=False, description="End the job at once, with success, when the steps are compared."
    )
    report: str | None = Field(
        default=None, description="File that rank 0 writes the verdict of each parameter to, JSON."
    )
