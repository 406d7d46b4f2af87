"""The config section ``zero_optimization.zenflow``."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from drivetrain.contracts import (
    NO_EFFECT,
    Bool,
    Float,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Section,
)


class ZenFlow(Section):
    """Updates split by importance (ZenFlow, arXiv:2505.12242); needs offload_optimizer on cpu."""

    topk_ratio: PositiveFloat = Field(
        default=0.1,
        le=1.0,
        description="Share of every tensor's columns that the device updates in each step: those "
        "with the largest gradients.",
    )
    update_interval: PositiveInt = Field(
        default=4,
        description="Steps whose mean gradient the host applies to all other columns at once.",
    )
    overlap_step: Bool = Field(
        default=False,
        description="Let the host compute its update during the next interval, at whose end it is "
        "shown; otherwise the last step of an interval waits for it.",
    )
    select_strategy: Literal["auto", "step", "epoch"] = Field(
        default="auto",
        description="Whether select_interval counts epochs, or steps (as auto does).",
    )
    select_interval: PositiveInt = Field(
        default=16,
        description="Columns are selected anew when an update_interval begins and this many steps "
        "or epochs have passed.",
    )
    steps_per_epoch: PositiveInt | None = Field(
        default=None, description="Steps of an epoch; needed where select_interval counts those."
    )
    full_warm_up_rounds: NonNegativeInt = Field(
        default=0, description="First steps in which the host updates everything."
    )
    auto_ratio: Float = Field(
        default=0.99, description=f"{NO_EFFECT}update_interval does not change by itself."
    )
    offload: Bool = Field(
        default=False, description=f"{NO_EFFECT}selected columns stay on the device."
    )
    pt_reserved_cores_perc: Float = Field(
        default=0.5, description=f"{NO_EFFECT}offload_optimizer.cpuadam_cores_perc decides."
    )

    @model_validator(mode="after")
    def _possible(self) -> ZenFlow:
        if self.select_strategy == "epoch" and self.steps_per_epoch is None:
            raise ValueError("select_strategy is epoch, which needs steps_per_epoch")
        return self

    @property
    def steps_selected(self) -> int:
        """Steps that a selection lasts at least."""
        if self.select_strategy == "epoch":
            assert self.steps_per_epoch is not None, "the section has been validated"
            return self.select_interval * self.steps_per_epoch
        return self.select_interval
