"""The difficulty as a function of the step, and the one that is in force."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING

from drivetrain.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from drivetrain_curriculum.section import CurriculumSection

Schedule = Callable[[int], int]
"""Step, from 1 -> difficulty."""


def difficulty_at(step: int, section: CurriculumSection) -> int:
    """The difficulty that a fixed schedule has at a step.

    Args:
        step: from 1.
        section: of any schedule but ``custom``.
    """
    config = section.schedule_config
    if section.schedule_type == "fixed_discrete":
        assert config.difficulty is not None
        assert config.max_step is not None
        return config.difficulty[bisect_left(config.max_step, step)]
    assert config.total_curriculum_step is not None
    assert config.difficulty_step is not None
    first, last = section.bounds
    progress = math.pow(step / config.total_curriculum_step, 1.0 / (config.root_degree or 1.0))
    raw = math.floor(progress * (last - first) + first)
    # Rounding down may go below the first difficulty, which DeepSpeed allows, down to 0 tokens.
    return min(max(raw - raw % config.difficulty_step, first), last)


class Pacing:
    """The difficulty of one engine. It is kept once it has reached the largest.

    Args:
        section: bounds and schedule.
    """

    def __init__(self, section: CurriculumSection) -> None:
        self._section = section
        self.current, self._last = section.bounds
        self.schedule: Schedule | None = None
        if section.schedule_type != "custom":
            self.schedule = lambda step: difficulty_at(step, section)

    def update(self, step: int) -> int:
        """The difficulty of ``step``, from 1, which becomes the current one.

        Raises:
            ConfigError: the schedule is ``custom`` and no function was set.
            TrainingError: the function's answer is not a positive integer.
        """
        if self.schedule is None:
            raise ConfigError(
                "curriculum_learning.schedule_type is custom, but there is no function: call "
                "drivetrain_curriculum.set_schedule(engine, function) before training"
            )
        if self.current < self._last:
            answer: object = self.schedule(step)
            if isinstance(answer, bool) or not isinstance(answer, int) or answer < 1:
                raise TrainingError(
                    f"the curriculum's function answered {answer!r} for step {step}; a difficulty "
                    "is a positive integer"
                )
            self.current = answer
        return self.current
