"""A measured step beside the one that the simulator predicts from the same times."""

from __future__ import annotations

from collections.abc import Mapping

from drivetrain_pipeline.schedules.costs import Costs
from drivetrain_pipeline.schedules.simulation import simulate
from drivetrain_pipeline.schedules.streams import Schedule
from drivetrain_pipeline.schedules.timeline import Timeline


def measured_costs(schedule: Schedule, measured: Timeline, send: float = 0.0) -> Costs:
    """Take the mean times of a measured step as costs.

    Args:
        schedule: that was run.
        measured: how it was run, with every pass of every chunk.
        send: time of a message.

    Raises:
        ValueError: a chunk has no time for one of its passes.
    """
    times = measured.times()

    def of(kind: str) -> tuple[float, ...]:
        found = [times.get((kind, chunk)) for chunk in range(schedule.chunks)]
        for chunk, time in enumerate(found):
            if time is None:
                raise ValueError(f"the measured step has no {kind} of chunk {chunk}")
        return tuple(time for time in found if time is not None)

    nothing = (0.0,) * schedule.chunks
    if not schedule.trains:
        return Costs(of("F"), nothing, nothing, send)
    if schedule.splits_backward:
        return Costs(of("F"), of("I"), of("W"), send)
    return Costs(of("F"), nothing, nothing, send, backward=of("B"))


def beside_prediction(
    schedule: Schedule, measured: Timeline, send: float = 0.0
) -> Mapping[str, Timeline]:
    """Return the timelines ``predicted`` and ``measured`` of one step.

    Where the measured one is longer, the difference is the time of messages, of whatever runs
    between instructions, and of instructions that take longer at one time than at another.

    Raises:
        ValueError: a chunk has no time for one of its passes.
    """
    costs = measured_costs(schedule, measured, send)
    return {"predicted": simulate(schedule, costs), "measured": measured}
