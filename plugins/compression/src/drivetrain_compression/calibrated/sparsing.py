"""Modifiers that prune after training."""

from __future__ import annotations

from typing import Generic, TypeVar

import torch
from pydantic import Field, field_validator
from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_compression.calibrated.gptq import (
    Inverse,
    SingularError,
    damped,
    held_damping,
    invert,
)
from drivetrain_compression.calibrated.modifiers import DAMPING, AfterTraining, Damping
from drivetrain_compression.calibrated.pruning import Pattern, sparsegpt, wanda
from drivetrain_compression.calibrated.refining import settle
from drivetrain_compression.calibrated.statistics import Inputs
from drivetrain_compression.recipe.modifier import (
    CompressionUnit,
    ModifierConfig,
    Place,
    Target,
)


class PruneConfig(ModifierConfig):
    """Which weights go."""

    pattern: str = Field(default="2:4", description="N of M neighbours stay, or the share to go.")

    @field_validator("pattern")
    @classmethod
    def _known(cls, text: str) -> str:
        Pattern.parse(text)
        return text


ConfigT = TypeVar("ConfigT", bound=PruneConfig)


class _Pruner(AfterTraining[ConfigT], Generic[ConfigT]):
    place = Place.PRUNE
    claims = "zeros"

    def check(self, target: Target) -> None:
        super().check(target)
        module: nn.Linear = target.module  # type: ignore[assignment]
        try:
            Pattern.parse(self.config.pattern).check(module.in_features)
        except ConfigError as error:
            raise ConfigError(f"{self.label}: {target.name}: {error}") from error

    def change(self, unit: CompressionUnit) -> None:
        pattern = Pattern.parse(self.config.pattern)
        for targets in self.together(unit):
            inputs = self.watch.of(targets[0].name)
            for target in targets:
                module: nn.Linear = target.module  # type: ignore[assignment]
                try:
                    pruned = self.prune(module.weight.float(), inputs, pattern)
                except SingularError as error:
                    raise ConfigError(f"{self.label}: {target.name}: {error}") from error
                module.weight.copy_(pruned)

    def prune(self, weight: torch.Tensor, inputs: Inputs, pattern: Pattern) -> torch.Tensor:
        """The pruned weight [out, in], float32."""
        raise NotImplementedError


class Wanda(_Pruner[PruneConfig]):
    """Wanda: the smallest weights times the size of their inputs go; the others stay."""

    config_class = PruneConfig
    gathers = "sizes"

    def prune(self, weight: torch.Tensor, inputs: Inputs, pattern: Pattern) -> torch.Tensor:
        return wanda(weight, inputs.squares, pattern)


class SparseGptConfig(PruneConfig):
    """SparseGPT."""

    damping: Damping = Field(default=0.01, description=DAMPING)
    block: int = Field(default=128, ge=1, description="Columns that are pruned together.")
    sweeps: int = Field(
        default=0, ge=0, description="Times that all weights that stay are moved again."
    )


class SparseGpt(_Pruner[SparseGptConfig]):
    """SparseGPT: the weights that stay make up for those that go."""

    config_class = SparseGptConfig

    def __init__(self, config: SparseGptConfig, label: str) -> None:
        super().__init__(config, label)
        self.gathers = "grams" if config.damping == "search" else "gram"  # type: ignore[misc]

    def prune(self, weight: torch.Tensor, inputs: Inputs, pattern: Pattern) -> torch.Tensor:
        config = self.config

        def chosen(inverse: Inverse, rows: slice) -> torch.Tensor:
            return sparsegpt(weight[rows], inverse, pattern, block=config.block)

        def pruned(rows: slice, hessian: torch.Tensor, share: float) -> torch.Tensor:
            return chosen(invert(hessian, share), rows)

        share = config.damping
        if share == "search":
            share = held_damping(weight, inputs.parts, pruned)
        hessian = inputs.gram
        inverse = invert(hessian, share)
        found = chosen(inverse, slice(None))
        if not config.sweeps:
            return found
        alive = weight * (hessian.diagonal() != 0)
        return settle(alive, found, damped(hessian, inverse.damping), sweeps=config.sweeps)
