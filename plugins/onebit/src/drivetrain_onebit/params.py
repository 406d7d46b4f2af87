"""Parameters of 1-bit Adam."""

from __future__ import annotations

from typing import Any

from pydantic import field_validator

from drivetrain.contracts import Betas, Bool, NonNegativeFloat, NonNegativeInt, OptimizerParams


class OneBitAdamParams(OptimizerParams):
    """``OneBitAdam``."""

    betas: Betas = (0.9, 0.999)
    eps: NonNegativeFloat = 1e-8
    weight_decay: NonNegativeFloat = 0.0
    freeze_step: NonNegativeInt = 100_000
    bias_correction: Bool = False
    cuda_aware: Bool = False
    comm_backend_name: str = "nccl"

    @field_validator("bias_correction")
    @classmethod
    def _has_none(cls, value: Any) -> Any:
        if value:
            raise ValueError("must be false: 1-bit Adam has no bias correction")
        return value
