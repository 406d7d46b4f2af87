"""The config section ``communication.routes``."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import Field, model_validator

from drivetrain.contracts import Bool, NonNegativeInt, PathText, PositiveInt, Section

PATH = "communication.routes"

ANY = "any"

RouteName = Literal["job", "shared_memory", "gloo", "nccl", "mpi", "two_levels"]
"""What rules and tables choose from; ``job`` is what collectives do without rules."""

CollectiveName = Literal[
    "any",
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "all_to_all",
    "broadcast",
    "send_receive",
    "barrier",
]


class Rule(Section):
    """Which route some collectives take. The first rule that fits decides."""

    route: RouteName = Field(
        description="shared_memory, gloo, nccl, mpi (mpi4py, ranks started by mpirun), two_levels, "
        "or job for what is done without rules."
    )
    collective: CollectiveName = Field(default="any", description="Which collectives.")
    axis: str = Field(default=ANY, description="Over which axis.")
    at_least_bytes: NonNegativeInt = Field(default=0, description="Smallest size of the tensor.")
    below_bytes: PositiveInt | None = Field(
        default=None, description="Size from which on the rule fits no more."
    )

    @model_validator(mode="after")
    def _fits_something(self) -> Self:
        if self.below_bytes is not None and self.below_bytes <= self.at_least_bytes:
            raise ValueError(
                f"below_bytes {self.below_bytes} is not above at_least_bytes "
                f"{self.at_least_bytes}, so no size fits"
            )
        return self


class RoutesSection(Section):
    """Which way collectives take: by rules, by a measured table, and in two levels over hosts."""

    rules: list[Rule] = Field(
        default=[], description="Go before the table. What no rule fits goes on to it."
    )
    table: PathText | None = Field(
        default=None,
        description="A file that `drivetrain comm tune` has written on this cluster. Rank 0 reads "
        "it.",
    )
    hierarchical: Bool = Field(
        default=True,
        description="Where neither rules nor a table decide, all-reduces and even all-to-alls go "
        "inside hosts first, and then between ranks of the same place on their hosts, so that each "
        "byte crosses the network once.",
    )
    ranks_per_host: PositiveInt | None = Field(
        default=None, description="Ranks of one host. Default: as the launcher says."
    )
    minimum_bytes: NonNegativeInt = Field(
        default=65536, description="With hierarchical: smaller tensors take one hop."
    )
