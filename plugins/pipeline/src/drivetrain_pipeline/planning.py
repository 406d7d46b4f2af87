"""Which schedule a plan has; no torch."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, cast

from drivetrain.contracts import Problem
from drivetrain.errors import ConfigError
from drivetrain_pipeline.schedules import (
    LayerCosts,
    Schedule,
    ScheduleError,
    best_of,
    candidates,
    schedule,
)
from drivetrain_pipeline.section import PATH, PipelineSection

if TYPE_CHECKING:
    from drivetrain.plan.plan import Plan


def section_of(plan: Plan) -> PipelineSection:
    """The section of a plan, with what a :class:`PipelineModule` of the model asks for.

    Raises:
        ConfigError: the config says something else.
    """
    section = plan.section(PipelineSection)
    objects = plan.objects.get(PATH)
    wishes: dict[str, Any] = {}
    for wish in () if objects is None else objects.wishes:
        wishes.update(cast("dict[str, Any]", wish))
    for key, value in wishes.items():
        given = getattr(section, key)
        if key in section.model_fields_set and given != value:
            raise ConfigError(
                f"{PATH}.{key} is {given} in the config, and {value} in the PipelineModule of the "
                "model: leave it out of one of them"
            )
    return section.model_copy(update=wishes)


FASTEST = "fastest"


def schedule_of(section: PipelineSection, micro_batches: int) -> Schedule:
    """Make the schedule of a section that names one; see :func:`settled`.

    Raises:
        ScheduleError: it cannot have these numbers.
    """
    assert section.schedule != FASTEST, "the section was not settled"
    return schedule(section.schedule, section.stages, micro_batches, section.chunks)


def settled(section: PipelineSection, micro_batches: int) -> PipelineSection:
    """Return the section with the name of a schedule, and its chunks, in place of ``fastest``.

    With measured times, the model is then cut by them, unless the section says how to cut.

    Args:
        section: of a plan.
        micro_batches: of a step.

    Raises:
        ConfigError: the file with measured times cannot be read.
        ScheduleError: no schedule keeps the memory limit, or has that many chunks.
    """
    if section.schedule != FASTEST:
        return section
    stages = section.stages
    tried = [
        found
        for found in candidates(_layers(section), stages, micro_batches)
        if section.chunks is None or found.schedule.chunks == stages * section.chunks
    ]
    if not tried:
        parts = "" if section.chunks is None else f" with {section.chunks} chunks on each"
        raise ScheduleError(
            f"{len(_layers(section))} layers fit no schedule of {stages} stages{parts}"
        )
    found = best_of(tried, section.memory_limit).schedule
    changes: dict[str, object] = {"schedule": found.name, "chunks": found.chunks // stages}
    if section.measured is not None and "partition" not in section.model_fields_set:
        changes["partition"] = "measured"
    return section.model_copy(update=changes)


def _layers(section: PipelineSection) -> Sequence[LayerCosts]:
    if section.measured is None:
        return [LayerCosts(1, 1, 1, 1)] * (section.stages * (section.chunks or 2))
    from drivetrain_pipeline.cutting import read_measured

    return list(read_measured(section).values())


def micro_batches_of(plan: Plan) -> int:
    """Micro-batches of a step; as many as stages where the plan leaves it open."""
    return section_of(plan).stages if plan.batch is None else plan.batch.accumulation_steps


def problems(section: PipelineSection, plan: Plan) -> Sequence[Problem]:
    """What is wrong with a section, as far as it can be told without a model."""
    steps = plan.config.get("gradient_accumulation_steps")
    micro_batches = steps if isinstance(steps, int) and steps > 0 else section.stages
    try:
        schedule_of(settled(section, micro_batches), micro_batches)
    except ScheduleError as error:
        return [Problem(f"{PATH}.schedule", str(error))]
    except ConfigError as error:
        return [Problem(f"{PATH}.measured", error.problems[0].partition(": ")[2])]
    return []
