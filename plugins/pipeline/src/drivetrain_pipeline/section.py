"""The config section ``pipeline``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal, Self

from pydantic import Field, model_validator

from drivetrain.contracts import Bool, NonNegativeInt, PathText, PositiveInt, Section

PATH = "pipeline"


class PipelineSection(Section):
    """How the model is split into stages, and in which order they compute."""

    stages: PositiveInt = Field(
        default=1, description="Ranks along the axis `pp`, each of which has a part of the layers."
    )
    schedule: Literal["1f1b", "gpipe", "interleaved", "zb_h1", "zb_v", "fastest"] = Field(
        default="1f1b",
        description="Order of forwards and backwards; `fastest` takes what a simulation finds, by "
        "`measured` times or else with equal layers.",
    )
    chunks: PositiveInt | None = Field(
        default=None,
        description="Parts of the model that each stage has, for `interleaved` and `zb_v`; by "
        "default the least that the schedule needs.",
    )
    memory_limit: PositiveInt | None = Field(
        default=None, description="Bytes of held activations on a rank, for `fastest`."
    )
    partition: str = Field(
        default="parameters",
        description="What stages have equal amounts of: `parameters` (also `auto`, `best`), "
        "`uniform` (layers), `type:REGEX` (layers whose class matches), or `measured` (time).",
    )
    measured: PathText | None = Field(
        default=None,
        description="File of `drivetrain_pipeline.measure`, for `measured`, `fastest`.",
    )
    place: Mapping[str, Literal["first", "last"]] = Field(
        default_factory=dict,
        description="Module outside of the repeated blocks -> stage that has it, where the order "
        "in the model's forward does not tell.",
    )
    activation_checkpoint_interval: NonNegativeInt = Field(
        default=0, description="Layers of a `PipelineModule` that are recomputed together; 0: none."
    )
    dynamic_shape: Bool = Field(
        default=False,
        description="Shapes between stages depend on values, so each message tells them.",
    )
    timeline: PathText | None = Field(
        default=None,
        description="File in which rank 0 writes a Chrome trace of the latest step, predicted "
        "and measured; each pass then waits for the device.",
    )
    seed_layers: Bool | None = Field(
        default=None,
        description="Seed before each layer of a `PipelineModule` is built; `null`: as it says.",
    )
    pipe_partitioned: Bool = Field(
        default=True,
        description="Accepted, has no effect: activations between stages travel whole.",
    )
    grad_partitioned: Bool = Field(
        default=True, description="Accepted, has no effect: gradients between stages travel whole."
    )
    use_reentrant: Bool | None = Field(
        default=None, description="Accepted, has no effect: recomputation is never re-entrant."
    )

    @model_validator(mode="after")
    def _possible(self) -> Self:
        if self.partition == "measured" and self.measured is None:
            raise ValueError(
                "partition is measured, which needs `measured`: the file that "
                "drivetrain_pipeline.measure has written"
            )
        known = ("parameters", "uniform", "measured", "auto", "best")
        if self.partition.lower() not in known and not self.partition.lower().startswith("type:"):
            raise ValueError(
                f"partition {self.partition!r} is not known; there are parameters, uniform, "
                "type:REGEX and measured"
            )
        if self.memory_limit is not None and self.schedule != "fastest":
            raise ValueError("memory_limit is only looked at where schedule is fastest")
        if self.memory_limit is not None and self.measured is None:
            raise ValueError(
                "memory_limit needs `measured`: only that file tells how much memory layers keep"
            )
        return self
