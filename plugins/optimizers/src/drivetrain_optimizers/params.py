"""Parameters of Lamb, Lion, Muon and the optimizers of muP."""

from __future__ import annotations

from typing import Literal, Self

from pydantic import model_validator

from drivetrain.contracts import (
    Betas,
    Bool,
    Float,
    NonNegativeFloat,
    OptimizerParams,
    PositiveInt,
    Share,
)


class LambParams(OptimizerParams):
    """``Lamb``."""

    betas: Betas = (0.9, 0.999)
    eps: NonNegativeFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    bias_correction: Bool = False
    max_coeff: NonNegativeFloat = 10.0
    min_coeff: NonNegativeFloat = 0.01
    eps_inside_sqrt: Bool = False

    @model_validator(mode="after")
    def _in_order(self) -> Self:
        if self.max_coeff < self.min_coeff:
            raise ValueError(f"max_coeff {self.max_coeff} is below min_coeff {self.min_coeff}")
        return self


class LionParams(OptimizerParams):
    """``Lion``."""

    betas: Betas = (0.9, 0.999)
    weight_decay: NonNegativeFloat = 0.0


class MuAdamParams(OptimizerParams):
    """``MuAdam`` and ``MuAdamW``."""

    betas: Betas = (0.9, 0.999)
    eps: NonNegativeFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0


class MuSGDParams(OptimizerParams):
    """``MuSGD``."""

    momentum: NonNegativeFloat = 0.0
    dampening: Float = 0.0
    weight_decay: NonNegativeFloat = 0.0
    nesterov: Bool = False

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> Self:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov needs momentum and no dampening")
        return self


class MuonParams(OptimizerParams):
    """``Muon``."""

    lr: NonNegativeFloat = 0.02
    momentum: Share = 0.95
    weight_decay: NonNegativeFloat = 0.0
    nesterov: Bool = True
    ns_steps: PositiveInt = 5
    ns_method: Literal["standard", "gram"] = "gram"
    muon_lr: NonNegativeFloat | None = None
    adam_lr: NonNegativeFloat = 3e-4
    betas: Betas = (0.9, 0.95)
    eps: NonNegativeFloat = 1e-10
