"""Parameters of the fused optimizers; beside ``drivetrain_kernels``, which imports torch."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from drivetrain.contracts import Betas, Bool, Float, NonNegativeFloat, OptimizerParams


class FusedParams(OptimizerParams):
    """What all fused rules take."""

    weight_decay: NonNegativeFloat = 0.0
    state_dtype: Literal["fp32", "bf16", "fp16"] | None = None
    stochastic_rounding: Bool = False


class FusedAdamParams(FusedParams):
    """``FusedAdam`` and ``FusedAdamW``."""

    betas: Betas = (0.9, 0.999)
    eps: NonNegativeFloat = 1e-8
    adam_w_mode: Bool = True
    bias_correction: Bool = True


class FusedAdagradParams(FusedParams):
    """``FusedAdagrad``."""

    lr: NonNegativeFloat = 1e-2
    eps: NonNegativeFloat = 1e-10


class FusedLionParams(FusedParams):
    """``FusedLion``."""

    betas: Betas = (0.9, 0.999)


class FusedSGDParams(FusedParams):
    """``FusedSGD``."""

    momentum: NonNegativeFloat = 0.0
    dampening: Float = 0.0
    nesterov: Bool = False

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov needs momentum and no dampening")
        return self


class FusedLambParams(FusedParams):
    """``FusedLamb``."""

    betas: Betas = (0.9, 0.999)
    eps: NonNegativeFloat = 1e-8
    bias_correction: Bool = False
    max_coeff: NonNegativeFloat = 10.0
    min_coeff: NonNegativeFloat = 0.01

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max_coeff < self.min_coeff:
            raise ValueError(f"max_coeff {self.max_coeff} is below min_coeff {self.min_coeff}")
        return self
