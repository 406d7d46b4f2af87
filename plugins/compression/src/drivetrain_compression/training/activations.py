"""Train with inputs of layers in few bits, their range taken from each token or learned."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Literal

import torch
from pydantic import Field
from torch import nn

from drivetrain.contracts import Op
from drivetrain_compression.quantisers.integer import (
    asymmetric,
    asymmetric_static,
    symmetric,
    symmetric_static,
)
from drivetrain_compression.quantisers.straight_through import straight_through
from drivetrain_compression.recipe.modifier import Place, Progress, Target
from drivetrain_compression.training.base import TrainingConfig, TrainingModifier
from drivetrain_compression.training.chain import Step

MOMENTUM = 0.95
"""Of the running range."""

RANGE = "activation_range"
"""Buffer of a module: least and largest input, [2]; equal until a step was made."""


class ActivationQuantisationConfig(TrainingConfig):
    """Bits of the inputs of layers."""

    bits: Literal[4, 8] = Field(description="4 or 8.")
    quantization_type: Literal["symmetric", "asymmetric"] = Field(
        default="symmetric", description="Grid around 0, or not."
    )
    range_calibration: Literal["dynamic", "static"] = Field(
        default="dynamic",
        description="A range for each token (for images, each image), or one for all, a running "
        "mean of training's.",
    )


class ActivationStep(Step):
    """Quantises the input.

    Args:
        owner: label of the modifier.
        config: bits and range.
    """

    order = 50

    def __init__(self, owner: str, config: ActivationQuantisationConfig) -> None:
        super().__init__(owner)
        self._config = config
        self.seen: torch.Tensor | None = None
        """Least and largest input of this rank since the last step, negated least first, [2]."""

    def inputs(self, module: nn.Module, inputs: torch.Tensor) -> torch.Tensor:
        """Inputs in few values; their gradient passes unchanged."""
        with torch.no_grad():
            exact = inputs if inputs.dtype == torch.float64 else inputs.float()
            if self._config.range_calibration == "static":
                changed = self._static(module, exact)
            else:
                changed = self._dynamic(module, exact)
        return straight_through(inputs, changed.to(inputs.dtype))

    def _dynamic(self, module: nn.Module, values: torch.Tensor) -> torch.Tensor:
        if not values.numel():
            return values
        by_image = isinstance(module, nn.Conv2d) and values.dim() == 4
        groups = values.reshape(values.shape[0], -1) if by_image else values
        kind = symmetric if self._config.quantization_type == "symmetric" else asymmetric
        return kind(groups, self._config.bits).view(values.shape)

    def _static(self, module: nn.Module, values: torch.Tensor) -> torch.Tensor:
        if not values.numel():
            return values
        low, high = values.aminmax()
        if module.training:
            both = torch.stack((-low, high))
            self.seen = both if self.seen is None else torch.maximum(self.seen, both)
        known: Any = module._buffers[RANGE]
        learned = known[0] != known[1]
        low = torch.where(learned, known[0].to(values.dtype), low)
        high = torch.where(learned, known[1].to(values.dtype), high)
        symmetrical = self._config.quantization_type == "symmetric"
        kind = symmetric_static if symmetrical else asymmetric_static
        return kind(values, low, high, self._config.bits)


class ActivationQuantisation(TrainingModifier[ActivationQuantisationConfig]):
    """Inputs of few bits in training.

    A static range moves once per optimizer step, by the least and largest input of all ranks and
    micro-batches of the step. So it is the same on all ranks, whatever the accumulation, and a
    forward that is recomputed sees the same. Before the first step each micro-batch has its own.
    """

    config_class = ActivationQuantisationConfig
    place = Place.QUANTISE
    takes = (nn.Linear, nn.Conv2d)
    claims = "input bits"

    def make_step(self, target: Target) -> ActivationStep:
        """Give the module a buffer for its range, if that is static."""
        if self.config.range_calibration == "static":
            weight: Any = target.module.weight
            device = "cpu" if weight.device.type == "meta" else weight.device
            target.module.register_buffer(RANGE, torch.zeros(2, device=device))
        return ActivationStep(self.label, self.config)

    def advance(self, progress: Progress) -> None:
        """Move static ranges. Collective."""
        steps = list(self.steps())
        if self.config.range_calibration != "static" or not steps:
            return
        first: Any = steps[0][0].module._buffers[RANGE]
        nothing = first.new_full((2,), -torch.inf, dtype=torch.float64)
        seen = torch.stack([nothing if s.seen is None else s.seen.to(nothing) for _, s in steps])
        self.over_ranks(seen, Op.MAX, "ranges of activations")
        for (target, step), (low, high) in zip(steps, seen, strict=True):
            step.seen = None
            if torch.isinf(high):
                continue
            known: Any = target.module._buffers[RANGE]
            new = torch.stack((-low, high)).to(known)
            if known[0] == known[1]:
                known.copy_(new)
            else:
                known.mul_(MOMENTUM).add_(new, alpha=1 - MOMENTUM)

    def bake(self, target: Target) -> None:
        """Forget the range: a weight cannot hold what is done to inputs."""
        target.module._buffers.pop(RANGE, None)

    def describe(self) -> Iterator[str]:
        """Bits and range."""
        yield from super().describe()
        yield f"{self.config.bits} bits, {self.config.range_calibration} range"
