"""The config sections of rules that are put around the chosen optimizer."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, ClassVar

from pydantic import Field

from drivetrain.contracts import Bool, Float, Plugin, PositiveInt, Section, Sections, hookimpl

if TYPE_CHECKING:
    from drivetrain.contracts import UpdateRule


class LookaheadSection(Section):
    """Every few updates, go back part of the way to the weights before them."""

    enabled: Bool = Field(default=True, description="Put Lookahead around the optimizer.")
    steps: PositiveInt = Field(default=5, description="Updates between two syncs (k).")
    alpha: Annotated[Float, Field(gt=0, le=1)] = Field(
        default=0.5, description="The share of the way that is kept."
    )


class Lookahead(Plugin):
    """Owns ``lookahead``."""

    name = "lookahead"
    sections: ClassVar[Sections] = {"lookahead": LookaheadSection}

    @hookimpl
    def wrap_update_rule(self, rule: UpdateRule) -> UpdateRule:
        from drivetrain_optimizers.lookahead import LookaheadRule

        section = self.section(LookaheadSection)
        return LookaheadRule(rule, section.steps, section.alpha)

    def features(self) -> Mapping[str, object]:
        return {"lookahead.steps": self.section(LookaheadSection).steps}


class WeightAverageSection(Section):
    """An exponential moving average of the weights, kept beside the optimizer's states."""

    enabled: Bool = Field(default=True, description="Keep the average.")
    decay: Annotated[Float, Field(ge=0, lt=1)] = Field(
        default=0.999, description="The share of the average that an update keeps."
    )


class WeightAverage(Plugin):
    """Owns ``weight_average``; what Lookahead does to the weights is in the average."""

    name = "weight_average"
    sections: ClassVar[Sections] = {"weight_average": WeightAverageSection}
    after: ClassVar[tuple[str, ...]] = ("lookahead",)

    @hookimpl
    def wrap_update_rule(self, rule: UpdateRule) -> UpdateRule:
        from drivetrain_optimizers.weight_average import AveragingRule

        return AveragingRule(rule, self.section(WeightAverageSection).decay)

    def features(self) -> Mapping[str, object]:
        return {"weight_average.decay": self.section(WeightAverageSection).decay}
