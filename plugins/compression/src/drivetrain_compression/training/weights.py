"""Train with weights that have few values: 1 to 16 bits, falling by a schedule.

The weight is quantised where it is used, so its master stays exact, and gradients pass as if
nothing had happened. Quantising a 16-bit copy after each update (MoQ) gives the same numbers, since
the next update starts from the master: ``quantize_weight_in_forward`` decides nothing but when.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import nn

from drivetrain.contracts import Bool, NonNegativeFloat, NonNegativeInt, PositiveInt
from drivetrain.errors import ConfigError
from drivetrain_compression.quantisers.grouping import in_groups
from drivetrain_compression.quantisers.integer import (
    MOST_BITS,
    Noise,
    asymmetric,
    binary,
    symmetric,
    ternary,
)
from drivetrain_compression.quantisers.straight_through import straight_through
from drivetrain_compression.recipe.modifier import Place, Progress, Target
from drivetrain_compression.training.base import TrainingConfig, TrainingModifier
from drivetrain_compression.training.chain import Step
from drivetrain_compression.training.schedule import BitSchedule, eigenvalue_factor

Kind = Literal["symmetric", "asymmetric"]


class WeightQuantisationConfig(TrainingConfig):
    """Bits of weights, and how they fall."""

    start_bits: PositiveInt = Field(description="Bits at the offset.")
    target_bits: PositiveInt = Field(description="Bits in the end; 2 is ternary, 1 is binary.")
    quantization_period: PositiveInt = Field(
        default=1, description="Steps until bits fall by one; it doubles each time."
    )
    quantize_groups: NonNegativeInt = Field(
        default=1,
        description="Scales of a weight, of equal parts in memory order; 0: one per row. An "
        "embedding has one per row always.",
    )
    quantization_type: Kind = Field(default="symmetric", description="Grid around 0, or not.")
    rounding: Literal["nearest", "stochastic"] = Field(
        default="nearest", description="To the nearest value, or by chance and right on average."
    )
    mixed_change_ratio: NonNegativeFloat = Field(
        default=0.0,
        description="Mix with the unquantised weight, whose share begins at 1 and falls by this "
        "per step, and begins again whenever bits fall; 0: no mixing.",
    )
    verbose: Bool = Field(default=False, description="Log when bits fall.")

    @model_validator(mode="after")
    def _bits_exist(self) -> WeightQuantisationConfig:
        for name in ("start_bits", "target_bits"):
            if (bits := getattr(self, name)) > MOST_BITS:
                raise ValueError(f"{name} is {bits}; there are formats of 1 to {MOST_BITS} bits")
        if self.target_bits > self.start_bits:
            raise ValueError(
                f"target_bits {self.target_bits} are more than start_bits {self.start_bits}; bits "
                "only fall"
            )
        plain = self.quantization_type == "symmetric" and self.rounding == "nearest"
        if self.target_bits < 3 and not plain:
            raise ValueError(
                f"{self.target_bits} bits (ternary, binary) are symmetric and rounded to nearest"
            )
        return self


def quantise_groups(groups: torch.Tensor, bits: int, kind: Kind, noise: Noise) -> torch.Tensor:
    """Groups [G, n] in ``bits``: integers from 3 on, ternary at 2, binary at 1."""
    if bits == 1:
        return binary(groups)
    if bits == 2:
        return ternary(groups)
    return (symmetric if kind == "symmetric" else asymmetric)(groups, bits, noise)


class WeightStep(Step):
    """Quantises the weight.

    Args:
        owner: label of the modifier.
        name: of the module; it names the random numbers of stochastic rounding.
        config: kind, groups, rounding.
        schedule: bits and mixing.
        groups: scales of the weight.
    """

    order = 10

    def __init__(
        self,
        owner: str,
        name: str,
        config: WeightQuantisationConfig,
        schedule: BitSchedule,
        groups: int,
    ) -> None:
        super().__init__(owner)
        self._name, self._config = name, config
        self.schedule, self._groups = schedule, groups

    def weight(self, module: nn.Module, weight: torch.Tensor) -> torch.Tensor:
        """The weight in few values; its gradient passes unchanged."""
        with torch.no_grad():
            exact = weight if weight.dtype == torch.float64 else weight.float()
            groups = in_groups(exact, self._groups, self._name)
            config, noise = self._config, self._noise(weight.device)
            changed = quantise_groups(groups, self.schedule.bits, config.quantization_type, noise)
            if ratio := self.schedule.ratio:
                changed = ratio * groups + (1 - ratio) * changed
            changed = changed.view(weight.shape).to(weight.dtype)
        return straight_through(weight, changed)

    def _noise(self, device: torch.device) -> Noise:
        if self._config.rounding == "nearest":
            return None
        # Of the step and the weight alone: ranks, recomputation and a resume draw the same.
        key = hashlib.sha256(f"{self._name} {self.schedule.calls}".encode()).digest()
        generator = torch.Generator(device).manual_seed(int.from_bytes(key[:7], "big"))

        def noise(like: torch.Tensor) -> torch.Tensor:
            drawn = torch.rand(like.shape, generator=generator, dtype=like.dtype, device=device)
            return drawn - 0.5

        return noise


class WeightQuantisation(TrainingModifier[WeightQuantisationConfig]):
    """Weights of few bits in training."""

    config_class = WeightQuantisationConfig
    place = Place.QUANTISE
    takes = (nn.Linear, nn.Conv2d, nn.Embedding)
    claims: ClassVar[str] = "weight bits"

    curvature: Callable[[str], float | None] | None = None
    """Returns the curvature of the block of a module, 1 the largest, where periods depend on it."""

    def due(self) -> bool:
        """True if bits of some weight fall at the next step."""
        return any(_is_due(step.schedule) for _, step in self.steps() if step.active)

    def make_step(self, target: Target) -> WeightStep:
        """Check that groups divide the weight."""
        config = self.config
        weight: Any = target.module.weight
        groups = 0 if isinstance(target.module, nn.Embedding) else config.quantize_groups
        label = f"{self.label}: {target.name}.weight"
        in_groups(torch.empty(weight.shape, device="meta"), groups, label)
        schedule = BitSchedule(
            config.start_bits,
            config.target_bits,
            config.quantization_period,
            config.mixed_change_ratio,
        )
        return WeightStep(self.label, target.name, config, schedule, groups)

    def advance(self, progress: Progress) -> None:
        """Let bits fall where their period is over."""
        for target, step in self.steps():
            value = None if self.curvature is None else self.curvature(target.name)
            fell = step.schedule.advance(1 if value is None else eigenvalue_factor(value))
            if fell and self.config.verbose:
                _tell(target.name, step.schedule.bits, progress.steps)

    def complete(self) -> None:
        """Use the fewest bits."""
        super().complete()
        for _, step in self.steps():
            step.schedule.bits, step.schedule.ratio = step.schedule.target, 0.0

    def bake(self, target: Target) -> None:
        """Leave the weight with the values that forward used; it stays floating point."""
        weight: Any = target.module._parameters["weight"]
        step = next((step for found, step in self.steps() if found is target), None)
        if step is None or not step.active:
            return
        _check_finite(weight, target.name)
        with torch.no_grad():
            weight.copy_(step.weight(target.module, weight))

    def describe(self) -> Iterator[str]:
        """Bits and when they fall."""
        config = self.config
        yield from super().describe()
        schedule = BitSchedule(config.start_bits, config.target_bits, config.quantization_period)
        calls = 0
        while schedule.bits > schedule.target and calls < 10_000_000:
            skipped = max(schedule.period - schedule.calls - 1, 0)
            schedule.calls += skipped
            calls = schedule.calls
            schedule.advance()
            yield f"{schedule.bits} bits from step {config.schedule_offset + calls}"

    def state(self) -> dict[str, Any]:
        """Schedules by module."""
        schedules = {target.name: step.schedule.state() for target, step in self.steps()}
        return {**super().state(), "schedules": schedules}

    def load_state(self, state: dict[str, Any]) -> None:
        """Go on with schedules; those of modules that are new stay as they are."""
        super().load_state(state)
        for target, step in self.steps():
            if target.name in state["schedules"]:
                step.schedule.load(state["schedules"][target.name])


def _is_due(schedule: BitSchedule) -> bool:
    return schedule.bits > schedule.target and schedule.calls + 1 >= schedule.period


def _check_finite(weight: torch.Tensor, name: str) -> None:
    if not bool(torch.isfinite(weight).all()):
        raise ConfigError(f"{name}.weight has numbers that are not finite; it has no scale")


def _tell(name: str, bits: int, step: int) -> None:
    import logging

    logging.getLogger("drivetrain.compression").info("step %d: %s in %d bits", step, name, bits)
