"""Remarks on a schedule's numbers, for whoever writes the config."""

from __future__ import annotations

from drivetrain_pipeline.schedules.costs import Costs
from drivetrain_pipeline.schedules.simulation import simulate
from drivetrain_pipeline.schedules.streams import Schedule


def warnings_of(schedule: Schedule) -> list[str]:
    """Say what makes a schedule slow, with its bubble.

    The bubble is that of stages that take equally long, whose gradients of inputs and of weights
    each take as long as a forward, and whose messages take no time.
    """
    count, stages = schedule.micro_batches, schedule.stages
    uneven = schedule.name == "interleaved" and count % stages
    if count >= stages and not uneven:
        return []
    bubble = simulate(schedule, Costs.even(schedule.chunks)).mean_bubble
    wanted = f"a multiple of {stages}" if uneven else f"at least {stages}"
    text = (
        f"{count} micro-batches for {stages} stages leave stages idle for {bubble:.0%} of a step "
        f"with schedule {schedule.name}; use {wanted} (gradient_accumulation_steps), or fewer "
        "stages"
    )
    return [text]
