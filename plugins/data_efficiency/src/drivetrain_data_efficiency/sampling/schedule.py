"""A difficulty as a function of the step."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable
from typing import TYPE_CHECKING

from drivetrain.errors import ConfigError, TrainingError

if TYPE_CHECKING:
    from drivetrain_data_efficiency.section import MetricSection

Schedule = Callable[[int], int]
"""Step, from 1 -> difficulty."""


def fixed_difficulty(step: int, metric: MetricSection) -> int:
    """The difficulty that a fixed schedule has at a step.

    ``fixed_root`` is ``floor((step / R) ** (1 / n) * (max - min) + min)``, rounded down to a
    multiple of ``difficulty_step``, and then within [min, max]; ``fixed_linear`` has n = 1.
    ``fixed_discrete`` is the first stage whose ``max_step`` is not passed.

    Args:
        step: from 1.
        metric: of any schedule but ``custom``.
    """
    config = metric.schedule_config
    if metric.schedule_type == "fixed_discrete":
        assert config.difficulty is not None
        assert config.max_step is not None
        return config.difficulty[bisect_left(config.max_step, step)]
    assert config.total_curriculum_step is not None
    assert config.difficulty_step is not None
    first, last = metric.min_difficulty, metric.max_difficulty
    progress = math.pow(step / config.total_curriculum_step, 1.0 / (config.root_degree or 1.0))
    raw = math.floor(progress * (last - first) + first)
    # Rounding down may go below the first difficulty, which DeepSpeed allows, down to 0.
    return min(max(raw - raw % config.difficulty_step, first), last)


class Difficulty:
    """The difficulty of one metric at every step.

    Args:
        name: of the metric.
        metric: bounds and schedule.
    """

    def __init__(self, name: str, metric: MetricSection) -> None:
        self.name = name
        self.metric = metric
        self.schedule: Schedule | None = None
        if metric.schedule_type != "custom":
            self.schedule = lambda step: fixed_difficulty(step, metric)

    def at(self, step: int) -> int:
        """The difficulty of a step, from 1.

        Raises:
            ConfigError: the schedule is ``custom`` and no function was set.
            TrainingError: the function returned something else than an integer within the bounds.
        """
        if self.schedule is None:
            raise ConfigError(
                f"data_efficiency: the schedule of the metric {self.name} is custom, but there is "
                "no function: call engine.set_custom_curriculum_learning_schedule"
                f"({{{self.name!r}: function}}) before training"
            )
        answer: object = self.schedule(step)
        first, last = self.metric.min_difficulty, self.metric.max_difficulty
        whole = isinstance(answer, int) and not isinstance(answer, bool)
        if not whole or not first <= answer <= last:  # type: ignore[operator]
            raise TrainingError(
                f"the schedule of the metric {self.name} returned {answer!r} for step {step}; a "
                f"difficulty is an integer from min_difficulty {first} to max_difficulty {last}"
            )
        assert isinstance(answer, int)
        return answer
