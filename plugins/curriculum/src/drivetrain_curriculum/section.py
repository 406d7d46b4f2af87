"""The ``curriculum_learning`` section and what makes one consistent."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator

from drivetrain.contracts import Bool, NonNegativeInt, PositiveFloat, PositiveInt, Section

ScheduleType = Literal["fixed_linear", "fixed_root", "fixed_discrete", "custom"]

_NEEDED = {
    "fixed_linear": {"total_curriculum_step", "difficulty_step"},
    "fixed_root": {"total_curriculum_step", "difficulty_step", "root_degree"},
    "fixed_discrete": {"difficulty", "max_step"},
    "custom": set[str](),
}


class ScheduleConfig(Section):
    """How the difficulty grows; which keys are needed depends on ``schedule_type``."""

    total_curriculum_step: PositiveInt | None = Field(
        default=None, description="Steps until the largest difficulty (fixed_linear, fixed_root)."
    )
    difficulty_step: PositiveInt | None = Field(
        default=None, description="Difficulties are multiples of this (fixed_linear, fixed_root)."
    )
    root_degree: PositiveFloat | None = Field(
        default=None, description="Progress enters as its root of this degree (fixed_root)."
    )
    difficulty: tuple[PositiveInt, ...] | None = Field(
        default=None, description="One difficulty for each stage (fixed_discrete)."
    )
    max_step: tuple[NonNegativeInt, ...] | None = Field(
        default=None, description="Last step of each stage but the last (fixed_discrete)."
    )

    @model_validator(mode="after")
    def _stages_fit(self) -> ScheduleConfig:
        if self.difficulty is None or self.max_step is None:
            return self
        if len(self.difficulty) != len(self.max_step) + 1:
            raise ValueError(
                f"difficulty has {len(self.difficulty)} stages and max_step ends "
                f"{len(self.max_step)} of them; there must be an end for each but the last"
            )
        if list(self.max_step) != sorted(self.max_step):
            raise ValueError(f"max_step must not fall, got {list(self.max_step)}")
        return self


class CurriculumSection(Section):
    """Sequences grow longer as training goes on."""

    enabled: Bool = Field(default=False, description="Tell the model the length, or cut to it.")
    curriculum_type: Literal["seqlen"] = Field(
        default="seqlen", description="What difficulty means: tokens of a sequence."
    )
    min_difficulty: PositiveInt | None = Field(default=None, description="First length, in tokens.")
    max_difficulty: PositiveInt | None = Field(default=None, description="Last length, in tokens.")
    schedule_type: ScheduleType | None = Field(
        default=None, description="How the length grows; custom takes a function."
    )
    schedule_config: ScheduleConfig = Field(
        default=ScheduleConfig(), description="The schedule's own keys."
    )
    truncate: Bool = Field(
        default=False,
        description="Cut the inputs here instead of handing curriculum_seqlen to the model.",
    )

    @property
    def bounds(self) -> tuple[int, int]:
        """First and last length; a section that is enabled has them."""
        assert self.min_difficulty is not None
        assert self.max_difficulty is not None
        return self.min_difficulty, self.max_difficulty

    @model_validator(mode="after")
    def _is_complete(self) -> CurriculumSection:
        if not self.enabled:
            return self
        required = ("min_difficulty", "max_difficulty", "schedule_type")
        missing = [key for key in required if getattr(self, key) is None]
        if missing:
            raise ValueError(f"needs {', '.join(missing)}")
        assert self.schedule_type is not None
        first, last = self.bounds
        if first > last:
            raise ValueError(f"min_difficulty {first} is larger than max_difficulty {last}")
        given = {k for k, v in self.schedule_config.model_dump().items() if v is not None}
        needed = _NEEDED[self.schedule_type]
        if given != needed:
            wanted, got = (", ".join(sorted(keys)) or "(none)" for keys in (needed, given))
            raise ValueError(
                f"schedule_config of {self.schedule_type} has the keys {wanted}; got {got}"
            )
        return self
