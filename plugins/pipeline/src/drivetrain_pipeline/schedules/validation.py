"""Proofs that streams of instructions are a pipeline's step, and end."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from typing import TYPE_CHECKING

from drivetrain_pipeline.schedules.costs import Costs
from drivetrain_pipeline.schedules.instruction import Exchange, Instruction, Message, Operation
from drivetrain_pipeline.schedules.simulation import simulate
from drivetrain_pipeline.schedules.streams import ScheduleError

if TYPE_CHECKING:
    from drivetrain_pipeline.schedules.streams import Schedule


def check(schedule: Schedule, held: Sequence[int] | None = None) -> None:
    """Prove that a schedule is right, or say what is wrong.

    Every micro-batch goes through every chunk once forward and once backward, in an order that the
    results allow; all stages reach their ends; every message is sent and received once, after
    what makes it and before what needs it; messages of two stages keep their order; and no stage
    waits for ever even if it goes on only after all messages of an exchange have passed.

    Args:
        schedule: to check.
        held: by stage, the most chunks' activations that may be kept at a time.

    Raises:
        ScheduleError: names the stage, the instruction or message, and what is wrong with it.
    """
    _complete(schedule)
    simulate(schedule, Costs.even(schedule.chunks))
    check_operations(schedule, [schedule.operations(s) for s in range(schedule.stages)])
    for stage, (most, allowed) in enumerate(zip(schedule.held(), held or (), strict=False)):
        if most > allowed:
            raise ScheduleError(
                f"schedule {schedule.name!r}: stage {stage} keeps activations of {most} chunks at "
                f"a time, more than the {allowed} that it may"
            )


def _complete(schedule: Schedule) -> None:
    """Check that each stage has each pass of its own chunks once, and gradients after forwards."""
    kinds: tuple[str, ...] = ("F",)
    if schedule.trains:
        kinds = ("F", "I", "W") if schedule.splits_backward else ("F", "B")
    for stage, stream in enumerate(schedule.streams):
        own = schedule.chunks_of(stage)
        if not own:
            raise ScheduleError(f"schedule {schedule.name!r}: stage {stage} holds no chunk")
        wanted = {(k, m, c) for k in kinds for m in range(schedule.micro_batches) for c in own}
        seen: Counter[tuple[str, int, int]] = Counter(
            (i.kind, i.micro_batch, i.chunk) for i in stream
        )
        for one in sorted(wanted ^ set(seen)) + [one for one, times in seen.items() if times > 1]:
            text = f"{one[0]}{one[1]}.{one[2]}"
            raise ScheduleError(
                f"schedule {schedule.name!r}: stage {stage} has {text} "
                f"{seen[one]} times instead of {int(one in wanted)}"
            )


def check_operations(schedule: Schedule, operations: Sequence[Sequence[Operation]]) -> None:
    """Check the exchanges of all stages; see :func:`check`.

    Args:
        schedule: whose messages they are.
        operations: by stage.

    Raises:
        ScheduleError: a message is missing, repeated, too late or out of order, or stages wait for
            each other.
    """
    pairs: dict[tuple[str, int, int], list[Message]] = defaultdict(list)
    for stage, own in enumerate(operations):
        _check_messages(schedule, stage, own)
        for operation in own:
            if isinstance(operation, Exchange):
                for message in operation.sends:
                    pairs["sent", stage, message.target].append(message)
                for message in operation.receives:
                    pairs["received", message.source, stage].append(message)
    for _, source, target in list(pairs):
        sent, received = pairs["sent", source, target], pairs["received", source, target]
        if sent != received:
            raise ScheduleError(
                f"schedule {schedule.name!r}: stage {source} sends to stage {target} in another "
                f"order than it receives: {_texts(sent)} and {_texts(received)}"
            )
    _meet(schedule, operations)


def _check_messages(schedule: Schedule, stage: int, operations: Sequence[Operation]) -> None:
    where = f"schedule {schedule.name!r}: stage {stage}"
    made: set[Message] = set()
    there: set[Message] = set()
    instructions = []
    for operation in operations:
        if isinstance(operation, Instruction):
            instructions.append(operation)
            needed = schedule.received_by(operation)
            if needed is not None and needed not in there:
                raise ScheduleError(f"{where} runs {operation} before it receives {needed}")
            message = schedule.sent_by(operation)
            if message is not None:
                made.add(message)
            continue
        for message in operation.sends:
            if message not in made:
                raise ScheduleError(f"{where} sends {message}, which it has not or has sent")
            made.remove(message)
        for message in operation.receives:
            if message in there:
                raise ScheduleError(f"{where} receives {message} twice")
            there.add(message)
    if made:
        raise ScheduleError(f"{where} never sends {_texts(sorted(made, key=str))}")
    if tuple(instructions) != schedule.streams[stage]:
        raise ScheduleError(f"{where} has other instructions than its stream")


def _meet(schedule: Schedule, operations: Sequence[Sequence[Operation]]) -> None:
    """Run all stages, each going on from an exchange only when all of it has passed."""
    place, entered = [0] * len(operations), [-1] * len(operations)
    ends: Counter[Message] = Counter()  # how many of a message's two stages have issued it
    able = set(range(len(operations)))
    while able:
        stage = able.pop()
        own = operations[stage]
        while place[stage] < len(own):
            operation = own[place[stage]]
            if isinstance(operation, Exchange):
                messages = [*operation.sends, *operation.receives]
                if entered[stage] != place[stage]:
                    entered[stage] = place[stage]
                    ends.update(messages)
                    able |= {m.source + m.target - stage for m in messages}
                if any(ends[m] < 2 for m in messages):
                    break
            place[stage] += 1
    waits = [
        f"stage {stage} waits in [{own[place[stage]]}]"
        for stage, own in enumerate(operations)
        if place[stage] < len(own)
    ]
    if waits:
        raise ScheduleError(f"schedule {schedule.name!r}: {'; '.join(waits)}; none can go on")


def _texts(messages: Sequence[Message]) -> str:
    return ", ".join(map(str, messages))
