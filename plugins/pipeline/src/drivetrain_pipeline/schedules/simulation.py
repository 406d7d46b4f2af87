"""Clocks of all stages while they run a schedule, without a device."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator
from typing import TYPE_CHECKING

from drivetrain_pipeline.schedules.instruction import Instruction
from drivetrain_pipeline.schedules.streams import Schedule, ScheduleError
from drivetrain_pipeline.schedules.timeline import Span, Timeline

if TYPE_CHECKING:
    from drivetrain_pipeline.schedules.costs import Costs


def simulate(schedule: Schedule, costs: Costs) -> Timeline:
    """Run a schedule by the clock.

    Each stage begins an instruction once it has finished the one before and everything that the
    instruction needs is there. Messages travel beside the computation.

    Args:
        schedule: what the stages do.
        costs: of each chunk.

    Raises:
        ScheduleError: the stages wait for each other, or for something that no stage makes.
        ValueError: ``costs`` are of another number of chunks.
    """
    if len(costs.forward) != schedule.chunks:
        raise ValueError(
            f"costs of {len(costs.forward)} chunks, but the schedule has {schedule.chunks}"
        )
    clock = [0.0] * schedule.stages
    spans: list[list[Span]] = [[] for _ in clock]
    arrivals: dict[Instruction, float] = {}
    for stage, instruction in _in_order(schedule):
        begin = clock[stage]
        for needed in schedule.needs(instruction):
            there = arrivals[needed]
            if schedule.placement[needed.chunk] != stage:
                there += costs.send
            begin = max(begin, there)
        end = begin + costs.time(instruction.kind, instruction.chunk)
        clock[stage] = arrivals[instruction] = end
        spans[stage].append(Span(instruction, begin, end))
    return Timeline(tuple(tuple(found) for found in spans))


def _in_order(schedule: Schedule) -> Iterator[tuple[int, Instruction]]:
    """All instructions, each after what it needs and after those before it on its stage."""
    place = [0] * schedule.stages
    finished: set[Instruction] = set()
    waiting: dict[Instruction, list[int]] = defaultdict(list)
    able = list(reversed(range(schedule.stages)))
    while able:
        stage = able.pop()
        stream = schedule.streams[stage]
        while place[stage] < len(stream):
            instruction = stream[place[stage]]
            missing = [n for n in schedule.needs(instruction) if n not in finished]
            if missing:
                waiting[missing[0]].append(stage)
                break
            yield stage, instruction
            place[stage] += 1
            finished.add(instruction)
            able += waiting.pop(instruction, ())
    if waiting:
        raise ScheduleError(_why(schedule, place, finished))


def _why(schedule: Schedule, place: list[int], finished: set[Instruction]) -> str:
    waits = []
    for stage, stream in enumerate(schedule.streams):
        if place[stage] < len(stream):
            instruction = stream[place[stage]]
            missing = next(n for n in schedule.needs(instruction) if n not in finished)
            waits.append(f"stage {stage} waits at {instruction} for {missing}")
    return f"schedule {schedule.name!r} cannot be run: {'; '.join(waits)}"
