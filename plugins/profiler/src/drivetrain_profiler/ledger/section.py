"""The config section ``ledger``."""

from __future__ import annotations

from pydantic import Field

from drivetrain.contracts import Bool, NonNegativeInt, PathText, Section

PATH = "ledger"


class LedgerSection(Section):
    """Writes down where the seconds, the memory and the bytes of a run went."""

    enabled: Bool = Field(default=True, description="Keep a ledger.")
    path: PathText = Field(
        default="ledger",
        description="The run's folder for it, one file per rank and attempt; a run that is started "
        "again with the same folder goes on in it.",
    )
    timeline_every: NonNegativeInt = Field(
        default=100,
        description="Of so many steps the first two are kept span by span, for timelines; 0 for "
        "none. Sums are kept of every step.",
    )
