"""The config section ``communication.watchdog``."""

from __future__ import annotations

from pydantic import Field

from drivetrain.contracts import Bool, Section

PATH = "communication.watchdog"


class WatchdogSection(Section):
    """Compare the collectives of all ranks, and end a job whose ranks wait for each other."""

    enabled: Bool = Field(default=True, description="Compare.")
    patience_seconds: float = Field(
        default=300.0,
        ge=0,
        allow_inf_nan=False,
        description="A rank that others wait for may stand still for so long before the job ends; "
        "0: for ever. Standing still is to use no processor and to wait for no disk.",
    )
