"""Parameters of the classes of ``torch.optim`` that a config may name."""

from __future__ import annotations

from typing import Annotated, Literal, Self

from pydantic import Field, model_validator

from drivetrain.contracts.plugin.params import Betas, OptimizerParams, Params, PerGroup, Two
from drivetrain.contracts.plugin.section import (
    Bool,
    Float,
    Int,
    NonNegativeFloat,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Share,
)

Portion = Annotated[NonNegativeFloat, Field(le=1)]


class TorchOptimizerParams(OptimizerParams):
    """What most classes of ``torch.optim`` take."""

    foreach: Bool | None = None
    maximize: Bool = False
    differentiable: Bool = False

    @model_validator(mode="after")
    def _one_implementation(self) -> Self:
        names = ("fused", "foreach", "differentiable")
        wanted = [name for name in names if getattr(self, name, None)]
        if len(wanted) > 1:
            raise ValueError(f"{wanted[0]} cannot be combined with {wanted[1]}")
        return self


class CapturableParams(TorchOptimizerParams):
    """A class that could run in a captured graph of a device."""

    capturable: Bool = False

    @model_validator(mode="after")
    def _is_not_captured(self) -> Self:
        if self.capturable and not getattr(self, "fused", None):
            raise ValueError("capturable must be false: updates are no part of a captured graph")
        return self


class _AdamLike(CapturableParams):
    weight_decay: NonNegativeFloat = 0.0
    betas: Betas = (0.9, 0.999)
    eps: NonNegativeFloat = 1e-8


class SGD(TorchOptimizerParams):
    """``torch.optim.SGD``."""

    weight_decay: NonNegativeFloat = 0.0
    momentum: NonNegativeFloat = 0.0
    dampening: Float = 0.0
    nesterov: Bool = False
    fused: Bool | None = None

    @model_validator(mode="after")
    def _nesterov_needs_momentum(self) -> SGD:
        if self.nesterov and (self.momentum == 0 or self.dampening != 0):
            raise ValueError("nesterov needs momentum and no dampening")
        return self


class Adagrad(TorchOptimizerParams):
    """``torch.optim.Adagrad``."""

    weight_decay: NonNegativeFloat = 0.0
    lr: NonNegativeFloat = 1e-2
    lr_decay: NonNegativeFloat = 0.0
    initial_accumulator_value: NonNegativeFloat = 0.0
    eps: NonNegativeFloat = 1e-10
    fused: Bool | None = None


class Adadelta(CapturableParams):
    """``torch.optim.Adadelta``."""

    weight_decay: NonNegativeFloat = 0.0
    lr: NonNegativeFloat = 1.0
    rho: Portion = 0.9
    eps: NonNegativeFloat = 1e-6


class Adamax(_AdamLike):
    """``torch.optim.Adamax``."""

    lr: NonNegativeFloat = 2e-3


class NAdam(_AdamLike):
    """``torch.optim.NAdam``."""

    lr: NonNegativeFloat = 2e-3
    momentum_decay: NonNegativeFloat = 4e-3
    decoupled_weight_decay: Bool = False


class RAdam(_AdamLike):
    """``torch.optim.RAdam``."""

    decoupled_weight_decay: Bool = False


class RMSprop(CapturableParams):
    """``torch.optim.RMSprop``."""

    weight_decay: NonNegativeFloat = 0.0
    lr: NonNegativeFloat = 1e-2
    alpha: Portion = 0.99
    eps: NonNegativeFloat = 1e-8
    momentum: NonNegativeFloat = 0.0
    centered: Bool = False


class Rprop(CapturableParams):
    """``torch.optim.Rprop``."""

    lr: NonNegativeFloat = 1e-2
    etas: Annotated[tuple[PositiveFloat, PositiveFloat], Two] = (0.5, 1.2)
    step_sizes: Annotated[tuple[NonNegativeFloat, NonNegativeFloat], Two] = (1e-6, 50.0)

    @model_validator(mode="after")
    def _around_one(self) -> Rprop:
        if not self.etas[0] < 1 < self.etas[1]:
            raise ValueError(f"etas must be below and above 1, got {list(self.etas)}")
        return self


class ASGD(CapturableParams):
    """``torch.optim.ASGD``."""

    weight_decay: NonNegativeFloat = 0.0
    lr: NonNegativeFloat = 1e-2
    lambd: NonNegativeFloat = 1e-4
    alpha: Portion = 0.75
    t0: Float = 1e6


class _TorchSchedule(Params):
    last_epoch: Annotated[Int, Field(ge=-1, le=-1)] = -1


class StepLR(_TorchSchedule):
    """``torch.optim.lr_scheduler.StepLR``."""

    step_size: PositiveInt
    gamma: NonNegativeFloat = 0.1


class MultiStepLR(_TorchSchedule):
    """``torch.optim.lr_scheduler.MultiStepLR``."""

    milestones: tuple[NonNegativeInt, ...]
    gamma: NonNegativeFloat = 0.1


class ConstantLR(_TorchSchedule):
    """``torch.optim.lr_scheduler.ConstantLR``."""

    factor: Portion = 1 / 3
    total_iters: NonNegativeInt = 5


class LinearLR(_TorchSchedule):
    """``torch.optim.lr_scheduler.LinearLR``."""

    start_factor: Annotated[PositiveFloat, Field(le=1)] = 1 / 3
    end_factor: Portion = 1.0
    total_iters: PositiveInt = 5


class ExponentialLR(_TorchSchedule):
    """``torch.optim.lr_scheduler.ExponentialLR``."""

    gamma: NonNegativeFloat


class CosineAnnealingLR(_TorchSchedule):
    """``torch.optim.lr_scheduler.CosineAnnealingLR``."""

    T_max: PositiveInt
    eta_min: Float = 0.0


class CosineAnnealingWarmRestarts(_TorchSchedule):
    """``torch.optim.lr_scheduler.CosineAnnealingWarmRestarts``."""

    T_0: PositiveInt
    T_mult: PositiveInt = 1
    eta_min: Float = 0.0


class PolynomialLR(_TorchSchedule):
    """``torch.optim.lr_scheduler.PolynomialLR``."""

    total_iters: PositiveInt = 5
    power: NonNegativeFloat = 1.0


class CyclicLR(_TorchSchedule):
    """``torch.optim.lr_scheduler.CyclicLR``."""

    base_lr: PerGroup
    max_lr: PerGroup
    step_size_up: PositiveInt = 2000
    step_size_down: PositiveInt | None = None
    mode: Literal["triangular", "triangular2", "exp_range"] = "triangular"
    gamma: NonNegativeFloat = 1.0
    scale_fn: None = None
    scale_mode: Literal["cycle", "iterations"] = "cycle"
    cycle_momentum: Bool = True
    base_momentum: PerGroup = 0.8
    max_momentum: PerGroup = 0.9


class OneCycleLR(_TorchSchedule):
    """``torch.optim.lr_scheduler.OneCycleLR``."""

    max_lr: PerGroup
    total_steps: PositiveInt | None = None
    epochs: PositiveInt | None = None
    steps_per_epoch: PositiveInt | None = None
    pct_start: Portion = 0.3
    anneal_strategy: Literal["cos", "linear"] = "cos"
    cycle_momentum: Bool = True
    base_momentum: PerGroup = 0.85
    max_momentum: PerGroup = 0.95
    div_factor: PositiveFloat = 25.0
    final_div_factor: PositiveFloat = 1e4
    three_phase: Bool = False

    @model_validator(mode="after")
    def _has_an_end(self) -> OneCycleLR:
        if self.total_steps is None and None in (self.epochs, self.steps_per_epoch):
            raise ValueError("needs total_steps, or epochs and steps_per_epoch")
        return self


class ReduceLROnPlateau(Params):
    """``torch.optim.lr_scheduler.ReduceLROnPlateau``."""

    mode: Literal["min", "max"] = "min"
    factor: Share = 0.1
    patience: NonNegativeInt = 10
    threshold: NonNegativeFloat = 1e-4
    threshold_mode: Literal["rel", "abs"] = "rel"
    cooldown: NonNegativeInt = 0
    min_lr: PerGroup = 0.0
    eps: NonNegativeFloat = 1e-8
