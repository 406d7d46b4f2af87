"""What a student learns from its teacher, and until when; no torch."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from drivetrain.contracts import Bool, NonNegativeFloat, NonNegativeInt, PositiveFloat, Section


class TermConfig(Section):
    """One term: an output of a module of the student should be like one of the teacher's."""

    student: str = Field(description="Path of the student's module; empty for the model.")
    teacher: str | None = Field(
        default=None, description="Path of the teacher's module; the student's by default."
    )
    output: NonNegativeInt | str = Field(
        default=0, description="Which output: place in a tuple, or key; 0 for a single tensor."
    )
    loss: Literal["mse", "soft_cross_entropy", "kl"] = Field(
        default="mse",
        description="Mean squared error, or cross entropy with the teacher's softmax, or their "
        "Kullback-Leibler divergence, which has the same gradient and is 0 for equal logits.",
    )
    weight: NonNegativeFloat = Field(default=1.0, description="Of the term in the loss.")
    temperature: PositiveFloat = Field(
        default=1.0, description="Divides logits; the term is times its square."
    )
    until_step: NonNegativeInt | None = Field(
        default=None,
        description="Optimizer steps after which the term is left out; by default it stays.",
    )
    decay_steps: NonNegativeInt = Field(
        default=0,
        description="Of these steps, the last ones in which the weight falls in a line to 0.",
    )

    @model_validator(mode="after")
    def _ends(self) -> TermConfig:
        if self.decay_steps > (self.until_step or 0):
            end = "there is no until_step" if self.until_step is None else self.until_step
            raise ValueError(f"decay_steps is {self.decay_steps}, but until_step: {end}")
        return self

    def weight_at(self, steps: int) -> float:
        """Weight of the term once ``steps`` optimizer steps are over."""
        if self.until_step is None:
            return self.weight
        left = max(0, self.until_step - steps)
        return self.weight * min(1.0, left / (self.decay_steps or 1))


class DistillationSection(Section):
    """Terms of the loss that compare a model with its teacher."""

    enabled: Bool = Field(default=False, description="Learn from a teacher.")
    terms: tuple[TermConfig, ...] = Field(
        default=(), description="What should be alike, with which weight, until which step."
    )

    @model_validator(mode="after")
    def _is_complete(self) -> DistillationSection:
        if self.enabled and not self.terms:
            raise ValueError("it is enabled, so terms are required")
        return self
