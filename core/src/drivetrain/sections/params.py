"""Parameters of core's own optimizers and schedules."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal, Self

from pydantic import Field, model_validator

from drivetrain.contracts.plugin.params import Betas, Params, PerGroup
from drivetrain.contracts.plugin.section import (
    Bool,
    Float,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
)
from drivetrain.sections.torch_params import CapturableParams


class AdamWParams(CapturableParams):
    """``AdamW``."""

    betas: Betas = (0.9, 0.999)
    eps: NonNegativeFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    adam_w_mode: Bool = True
    torch_adam: Bool = False
    bias_correction: Bool = True
    set_grad_none: Bool = True
    fp32_optimizer_states: Bool = False
    amsgrad: Bool = False
    fused: Bool | None = None


class AdamParams(AdamWParams):
    """``Adam``."""

    decoupled_weight_decay: Bool = False

    @model_validator(mode="after")
    def _decoupled_once(self) -> Self:
        if self.adam_w_mode and "decoupled_weight_decay" in self.model_fields_set:
            raise ValueError("decoupled_weight_decay needs adam_w_mode: false")
        return self


class LRRangeTestParams(Params):
    """``LRRangeTest``."""

    lr_range_test_min_lr: PerGroup = 1e-3
    lr_range_test_step_size: PositiveInt = 2000
    lr_range_test_step_rate: NonNegativeFloat = 1.0
    lr_range_test_staircase: Bool = False


class OneCycleParams(Params):
    """``OneCycle``."""

    cycle_min_lr: PerGroup
    cycle_max_lr: PerGroup
    decay_lr_rate: NonNegativeFloat = 0.0
    cycle_first_step_size: PositiveInt = 2000
    cycle_second_step_size: NonNegativeInt | None = None
    cycle_first_stair_count: NonNegativeInt = 0
    cycle_second_stair_count: NonNegativeInt | None = None
    decay_step_size: NonNegativeInt = 0
    cycle_momentum: Bool = True
    cycle_min_mom: PerGroup = 0.8
    cycle_max_mom: PerGroup = 0.9
    decay_mom_rate: Float = 0.0


class _Warmup(Params):
    to_be_filled: ClassVar[tuple[str, ...]] = ("warmup_num_steps",)

    warmup_num_steps: NonNegativeFloat = 1000
    warmup_type: Literal["log", "linear"] = "log"


class WarmupLRParams(_Warmup):
    """``WarmupLR``."""

    warmup_min_lr: PerGroup = 0.0
    warmup_max_lr: PerGroup | None = None


class WarmupDecayLRParams(WarmupLRParams):
    """``WarmupDecayLR``."""

    total_num_steps: Annotated[PositiveFloat, Field(ge=1)]


class WarmupCosineLRParams(_Warmup):
    """``WarmupCosineLR``."""

    total_num_steps: Annotated[PositiveFloat, Field(ge=1)]
    warmup_min_ratio: NonNegativeFloat = 0.0
    cos_min_ratio: NonNegativeFloat = 1e-4
