"""What ``drivetrain explain`` shows of a pipeline: its timeline, bubble and memory. No torch."""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING

from drivetrain_pipeline.planning import FASTEST, micro_batches_of, schedule_of, section_of, settled
from drivetrain_pipeline.schedules import (
    NAMES,
    Costs,
    Drawing,
    Schedule,
    schedule,
    simulate,
    warnings_of,
)

if TYPE_CHECKING:
    from drivetrain.plan.plan import Plan

_SHOWN = 24
"""Micro-batches that are drawn; more of them repeat the middle."""

_COLUMNS = 120
"""At most in a line of the timeline, if a pass has one or more."""


def rows(plan: Plan) -> Iterator[tuple[str, object]]:
    """Explain the pipeline of a plan, by simulation of stages that take equally long.

    Times are in units of a forward of one stage. The gradients of inputs and of weights take one
    each, and messages take none.
    """
    given = section_of(plan)
    micro_batches = micro_batches_of(plan)
    section = settled(given, micro_batches)
    if section.stages == 1:
        yield "stages", "1, so nothing is passed on and nothing waits"
        return
    made = schedule_of(section, micro_batches)
    timeline = simulate(made, _even(made))
    by = "measured times" if given.measured is not None else "times of equal layers"
    chosen = f" (fastest by {by})" if given.schedule == FASTEST else ""
    yield "schedule", f"{made.name}{chosen}, {micro_batches} micro-batches"
    for stage in range(made.stages):
        yield f"stage {stage} holds", _parts(made, stage)
    shown = schedule(made.name, made.stages, min(micro_batches, _SHOWN), _of_stage(made))
    left_out = "" if shown.micro_batches == micro_batches else f", first {_SHOWN} micro-batches"
    drawn = simulate(shown, _even(shown))
    passes = round(drawn.makespan * _of_stage(made))
    columns = passes * max(1, _COLUMNS // passes)  # equal passes are equally wide
    yield f"a step{left_out}", Drawing(drawn, f"{made.name}{left_out}", columns)
    between = timeline.bubble_between
    yield (
        "bubble",
        (f"{timeline.mean_bubble:.1%} of the devices' time ({between:.1%} between a stage's ends)"),
    )
    yield "micro-batches held", ", ".join(_held(made))
    for name in NAMES:
        if name != made.name:
            other = schedule(name, section.stages, micro_batches)
            bubble = simulate(other, _even(other)).mean_bubble
            most = max(map(float, _held(other)))
            yield f"with {name}", f"bubble {bubble:.1%}, at most {most:g} micro-batches held"
    for warning in warnings_of(made):
        yield "warning", warning


def _of_stage(made: Schedule) -> int:
    return made.chunks // made.stages


def _even(made: Schedule) -> Costs:
    part = 1 / _of_stage(made)
    return Costs.even(made.chunks, forward=part, inputs=part, weights=part)


def _parts(made: Schedule, stage: int) -> str:
    numbers = ", ".join(str(chunk + 1) for chunk in made.chunks_of(stage))
    return f"part {numbers} of {made.chunks} of the model"


def _held(made: Schedule) -> list[str]:
    """By stage, in activations of a whole stage for one micro-batch."""
    return [f"{held / _of_stage(made):g}" for held in made.held()]
