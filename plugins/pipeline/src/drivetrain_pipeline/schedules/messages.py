"""Sends and receives, derived from who holds which chunk.

All messages of a step have one order. Each stage issues its own messages in that order, and places
them among its instructions as if all stages kept time. Every stage's operations are then a part
of one sequence in which each message follows what makes it and precedes what needs it. So a stage
that is earliest in that sequence can always go on, even where a send blocks until it is received,
and where a stage's messages with all others go through one queue, as NCCL's do.

What two stages send each other at one moment is one exchange, so that it can pass in both
directions at once. An exchange has one message in each direction at most: whoever waits for a
message must not wait for another that is needed later, and comes later where stages do not keep
time.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from drivetrain_pipeline.schedules.costs import Costs
from drivetrain_pipeline.schedules.instruction import Exchange, Message, Operation
from drivetrain_pipeline.schedules.simulation import simulate

if TYPE_CHECKING:
    from drivetrain_pipeline.schedules.streams import Schedule
    from drivetrain_pipeline.schedules.timeline import Span

_Passing = tuple[float, int, int, int]
"""Moment, lower and higher of two stages, and number among what one sends the other then."""


def with_messages(schedule: Schedule) -> tuple[tuple[Operation, ...], ...]:
    """Put the exchanges of messages between the instructions of all stages.

    Raises:
        ScheduleError: the streams cannot be run.
    """
    timeline = simulate(schedule, Costs.even(schedule.chunks))
    # By stage, its messages by when and with whom they pass, alike on both sides.
    passing: list[dict[_Passing, list[Message]]] = [defaultdict(list) for _ in timeline.spans]
    numbers: Counter[tuple[float, int, int]] = Counter()
    for span in sorted((span for own in timeline.spans for span in own), key=_place):
        message = schedule.sent_by(span.instruction)
        if message is not None:
            source, target = message.source, message.target
            number = numbers[span.end, source, target]
            numbers[span.end, source, target] += 1
            key = span.end, min(source, target), max(source, target), number
            passing[source][key].append(message)
            passing[target][key].append(message)
    return tuple(_merged(stage, own, passing[stage]) for stage, own in enumerate(timeline.spans))


def _place(span: Span) -> tuple[float, str, int, int]:
    one = span.instruction
    return span.end, one.kind, one.micro_batch, one.chunk


def _merged(
    stage: int, spans: Sequence[Span], passing: Mapping[_Passing, Sequence[Message]]
) -> tuple[Operation, ...]:
    """A stage's instructions by their ends, and behind those of a moment its messages."""
    events: list[tuple[float, int, tuple[int, ...], Operation]] = [
        (span.end, 0, (), span.instruction) for span in spans
    ]
    for (moment, *pair), messages in passing.items():
        sends = tuple(m for m in messages if m.source == stage)
        receives = tuple(m for m in messages if m.target == stage)
        events.append((moment, 1, tuple(pair), Exchange(sends, receives)))
    events.sort(key=lambda event: event[:3])
    return tuple(event[3] for event in events)
