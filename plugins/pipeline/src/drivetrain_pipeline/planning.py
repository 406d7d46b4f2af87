"""Which schedule a plan has; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from drivetrain.contracts import Problem
from drivetrain_pipeline.schedules import Schedule, ScheduleError, schedule
from drivetrain_pipeline.section import PATH

if TYPE_CHECKING:
    from drivetrain.plan.plan import Plan
    from drivetrain_pipeline.section import PipelineSection


def schedule_of(section: PipelineSection, micro_batches: int) -> Schedule:
    """Make the schedule of a section that names one.

    Raises:
        ScheduleError: it cannot have these numbers.
    """
    assert section.schedule != "fastest", "that is chosen when the layers are known"
    return schedule(section.schedule, section.stages, micro_batches, section.chunks)


def problems(section: PipelineSection, plan: Plan) -> Sequence[Problem]:
    """What is wrong with a section, as far as it can be told without a model."""
    if section.schedule == "fastest":
        return []
    steps = plan.config.get("gradient_accumulation_steps")
    micro_batches = steps if isinstance(steps, int) and steps > 0 else section.stages
    try:
        schedule_of(section, micro_batches)
    except ScheduleError as error:
        return [Problem(f"{PATH}.schedule", str(error))]
    return []
