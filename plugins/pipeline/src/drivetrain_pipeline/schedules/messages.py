"""Sends and receives, derived from who holds which chunk.

All messages of a step have one order. Each stage issues its own messages in that order, and places
them among its instructions as if all stages kept time. Every stage's operations are then a part
of one sequence in which each message follows what makes it and precedes what needs it. So a stage
that is earliest in that sequence can always go on, even where a send blocks until it is received,
and where a stage's messages with all others go through one queue, as NCCL's do.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from drivetrain_pipeline.schedules.costs import Costs
from drivetrain_pipeline.schedules.instruction import Exchange, Message, Operation
from drivetrain_pipeline.schedules.simulation import simulate

if TYPE_CHECKING:
    from drivetrain_pipeline.schedules.streams import Schedule
    from drivetrain_pipeline.schedules.timeline import Span


def with_messages(schedule: Schedule) -> tuple[tuple[Operation, ...], ...]:
    """Put the exchanges of messages between the instructions of all stages.

    Raises:
        ScheduleError: the streams cannot be run.
    """
    timeline = simulate(schedule, Costs.even(schedule.chunks))
    # By stage and moment; of all messages of a moment the same order on all stages.
    made: list[dict[float, list[Message]]] = [defaultdict(list) for _ in timeline.spans]
    for span in sorted((span for spans in timeline.spans for span in spans), key=_place):
        message = schedule.sent_by(span.instruction)
        if message is not None:
            made[message.source][span.end].append(message)
            made[message.target][span.end].append(message)
    return tuple(_merged(stage, spans, made[stage]) for stage, spans in enumerate(timeline.spans))


def _place(span: Span) -> tuple[float, str, int, int]:
    one = span.instruction
    return span.end, one.kind, one.micro_batch, one.chunk


def _merged(
    stage: int, spans: Sequence[Span], messages: Mapping[float, Sequence[Message]]
) -> tuple[Operation, ...]:
    """A stage's instructions by their ends, and behind those of a moment its messages.

    Messages of several moments are never one exchange: who waits for the first would wait for all.
    """
    events: list[tuple[float, int, Operation]] = [(span.end, 0, span.instruction) for span in spans]
    for moment, all_of_it in messages.items():
        sends = tuple(m for m in all_of_it if m.source == stage)
        receives = tuple(m for m in all_of_it if m.target == stage)
        events.append((moment, 1, Exchange(sends, receives)))
    events.sort(key=lambda event: event[:2])
    return tuple(event[2] for event in events)
