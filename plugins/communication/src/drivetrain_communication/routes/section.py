"""The config section ``communication.routes``."""

from __future__ import annotations

from pydantic import Field

from drivetrain.contracts import Bool, NonNegativeInt, PositiveInt, Section

PATH = "communication.routes"


class RoutesSection(Section):
    """Which way collectives take where an axis has several ranks on each of several hosts."""

    hierarchical: Bool = Field(
        default=True,
        description="All-reduces and even all-to-alls go inside hosts first, and then between "
        "ranks of the same place on their hosts, so that each byte crosses the network once.",
    )
    ranks_per_host: PositiveInt | None = Field(
        default=None, description="Ranks of one host. Default: as the launcher says."
    )
    minimum_bytes: NonNegativeInt = Field(
        default=65536, description="Smaller tensors take one hop, whose latency counts more."
    )
