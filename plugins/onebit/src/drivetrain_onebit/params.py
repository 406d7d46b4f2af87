"""Parameters of the optimizers that send one bit per element."""

from __future__ import annotations

from typing import Annotated, Any, Self

from pydantic import Field, field_validator, model_validator

from drivetrain.contracts import (
    Betas,
    Bool,
    NonNegativeFloat,
    NonNegativeInt,
    OptimizerParams,
    PositiveInt,
)

Share = Annotated[NonNegativeFloat, Field(le=1)]


class _OneBit(OptimizerParams):
    betas: Betas = (0.9, 0.999)
    eps: NonNegativeFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    bias_correction: Bool = False
    cuda_aware: Bool = False
    comm_backend_name: str = "nccl"

    @field_validator("bias_correction")
    @classmethod
    def _has_none(cls, value: Any) -> Any:
        if value:
            raise ValueError("must be false: the algorithm has no bias correction")
        return value


class OneBitAdamParams(_OneBit):
    """``OneBitAdam``."""

    freeze_step: NonNegativeInt = 100_000


class OneBitLambParams(_OneBit):
    """``OneBitLamb``."""

    freeze_step: PositiveInt = 100_000
    max_coeff: NonNegativeFloat = 10.0
    min_coeff: NonNegativeFloat = 0.01
    coeff_beta: Share = 0.9
    factor_max: NonNegativeFloat = 4.0
    factor_min: NonNegativeFloat = 0.5
    factor_threshold: NonNegativeFloat = 0.1
    eps_inside_sqrt: Bool = False
    max_grad_norm: NonNegativeFloat = 0.0

    @field_validator("eps_inside_sqrt", "max_grad_norm")
    @classmethod
    def _is_off(cls, value: Any) -> Any:
        if value:
            raise ValueError("is not supported; leave it out (gradient_clipping clips)")
        return value

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max_coeff < self.min_coeff or self.factor_max < self.factor_min:
            raise ValueError("max_coeff and factor_max must not be below min_coeff and factor_min")
        return self


class ZeroOneAdamParams(_OneBit):
    """``ZeroOneAdam``."""

    var_freeze_step: PositiveInt = 100_000
    var_update_scaler: PositiveInt = 16
    local_step_scaler: PositiveInt = 32_678
    local_step_clipper: PositiveInt = 16
