"""A schedule: what each stage of a pipeline does, in which order."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

from drivetrain.errors import DrivetrainError
from drivetrain_pipeline.schedules.instruction import Instruction, Message, Operation


class ScheduleError(DrivetrainError):
    """A schedule that cannot be made, or streams of instructions that cannot be run."""


@dataclass(frozen=True)
class Schedule:
    """One stream of instructions for each stage of a pipeline, for one step.

    A *stage* is a rank's place along ``pp``. A *chunk* is a run of consecutive layers. Chunks are
    numbered along the model, so chunk ``c`` takes what chunk ``c - 1`` has made; a stage holds one
    chunk or several.

    Args:
        name: how a config calls it.
        micro_batches: how many each step has.
        placement: the stage that holds each chunk.
        streams: by stage, its instructions in order.
    """

    name: str
    micro_batches: int
    placement: tuple[int, ...]
    streams: tuple[tuple[Instruction, ...], ...]

    @property
    def stages(self) -> int:
        """Number of stages."""
        return len(self.streams)

    @property
    def chunks(self) -> int:
        """Number of chunks of the whole model."""
        return len(self.placement)

    @cached_property
    def splits_backward(self) -> bool:
        """True if gradients of weights are computed apart from those of inputs."""
        return any(i.kind == "W" for stream in self.streams for i in stream)

    @cached_property
    def trains(self) -> bool:
        """True if there is any backward."""
        return any(i.kind != "F" for stream in self.streams for i in stream)

    def chunks_of(self, stage: int) -> tuple[int, ...]:
        """Chunks that a stage holds, in the order of the model."""
        return tuple(c for c, holder in enumerate(self.placement) if holder == stage)

    def needs(self, instruction: Instruction) -> tuple[Instruction, ...]:
        """Instructions that must be finished before ``instruction`` can begin."""
        kind, m, c = instruction.kind, instruction.micro_batch, instruction.chunk
        if kind == "F":
            return (Instruction("F", m, c - 1),) if c else ()
        if kind == "W":
            return (Instruction("I", m, c),)
        forward = Instruction("F", m, c)
        return (forward, Instruction(kind, m, c + 1)) if c + 1 < self.chunks else (forward,)

    def sent_by(self, instruction: Instruction) -> Message | None:
        """The message that an instruction's result travels in.

        Returns:
            None where nothing needs the result, or where the stage that needs it has it already.
        """
        if instruction.kind == "W":
            return None
        forward = instruction.kind == "F"
        made = instruction.chunk
        taken = made + 1 if forward else made - 1
        if not 0 <= taken < self.chunks:
            return None
        source, target = self.placement[made], self.placement[taken]
        if source == target:
            return None
        return Message("F" if forward else "B", instruction.micro_batch, made, source, target)

    def received_by(self, instruction: Instruction) -> Message | None:
        """The message that must have arrived before ``instruction`` can begin, or None."""
        if instruction.kind == "W":
            return None
        step = -1 if instruction.kind == "F" else 1
        made = instruction.chunk + step
        if not 0 <= made < self.chunks:
            return None
        return self.sent_by(Instruction(instruction.kind, instruction.micro_batch, made))

    def operations(self, stage: int) -> tuple[Operation, ...]:
        """A stage's instructions with the exchanges of messages between them.

        Every stage issues its messages in one order that all stages share, so that no stage can
        wait for one that waits for it, even where sends block. An exchange should be started and
        not waited for; before an instruction, the stage waits for the message ``received_by`` it.
        """
        return self._operations[stage]

    @cached_property
    def _operations(self) -> tuple[tuple[Operation, ...], ...]:
        from drivetrain_pipeline.schedules.messages import with_messages

        return with_messages(self)

    def held(self) -> tuple[int, ...]:
        """By stage, the most forward passes whose activations are kept at a time.

        Each counts as one chunk. It is kept from the begin of its forward to the end of its
        backward, or of its gradients of weights where these are computed apart.
        """
        last = "W" if self.splits_backward else "B"
        return tuple(_most(stream, last) for stream in self.streams)


def _most(stream: Sequence[Instruction], last: str) -> int:
    held = most = 0
    for instruction in stream:
        if instruction.kind == "F":
            held += 1
            most = max(most, held)
        elif instruction.kind == last:
            held -= 1
    return most
