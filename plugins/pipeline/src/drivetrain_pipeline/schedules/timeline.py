"""When each stage ran what: predicted by the simulator, or measured in a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from drivetrain_pipeline.schedules.instruction import Instruction

if TYPE_CHECKING:
    from drivetrain_pipeline.schedules.costs import Costs


@dataclass(frozen=True, slots=True)
class Span:
    """One instruction as it ran.

    Args:
        instruction: what ran.
        begin: when, in any unit of time.
        end: when it was finished, on the same clock.
    """

    instruction: Instruction
    begin: float
    end: float


@dataclass(frozen=True)
class Timeline:
    """The spans of a step.

    Args:
        spans: by stage, in the order of their beginning.
    """

    spans: tuple[tuple[Span, ...], ...]

    @classmethod
    def measured(cls, spans: Sequence[Sequence[tuple[str, float, float]]]) -> Timeline:
        """Make a timeline of what recorders have seen.

        Args:
            spans: by stage, what :meth:`Recorder.spans` returned there.

        Raises:
            ValueError: a text is no instruction.
        """
        return cls(
            tuple(
                tuple(Span(Instruction.parse(text), begin, end) for text, begin, end in stage)
                for stage in spans
            )
        )

    @property
    def begin(self) -> float:
        """When the first stage began."""
        return min((span.begin for stage in self.spans for span in stage), default=0.0)

    @property
    def end(self) -> float:
        """When the last stage was finished."""
        return max((span.end for stage in self.spans for span in stage), default=0.0)

    @property
    def makespan(self) -> float:
        """Time from the first begin to the last end of all stages."""
        return self.end - self.begin

    def busy(self, stage: int) -> float:
        """Time in which a stage ran instructions."""
        return sum(span.end - span.begin for span in self.spans[stage])

    def bubble(self, stage: int) -> float:
        """The fraction of the makespan in which a stage ran nothing."""
        return 1 - self.busy(stage) / self.makespan if self.makespan else 0.0

    @property
    def bubbles(self) -> tuple[float, ...]:
        """:meth:`bubble` by stage."""
        return tuple(self.bubble(stage) for stage in range(len(self.spans)))

    @property
    def mean_bubble(self) -> float:
        """The mean of all stages' bubbles: the part of the devices' time that is lost."""
        return sum(self.bubbles) / len(self.spans)

    @property
    def bubble_between(self) -> float:
        """The bubble as Qi et al. 2023 define it: of the slowest stage, between its own ends.

        It leaves out what a stage waits before its first instruction and after its last. This is
        lost only once where steps follow each other without waiting for all stages.
        """
        longest = max((s[-1].end - s[0].begin for s in self.spans if s), default=0.0)
        most = max((self.busy(stage) for stage in range(len(self.spans))), default=0.0)
        return 1 - most / longest if longest else 0.0

    def peaks(self, costs: Costs) -> tuple[float, ...]:
        """By stage, the most memory at a time: ``fixed`` of its chunks and activations."""
        return tuple(_peak(stage, costs) for stage in self.spans)

    def times(self) -> Mapping[tuple[str, int], float]:
        """(Kind, chunk) -> mean time of that pass: what the simulator can be given as costs."""
        found: dict[tuple[str, int], list[float]] = {}
        for stage in self.spans:
            for span in stage:
                key = (span.instruction.kind, span.instruction.chunk)
                found.setdefault(key, []).append(span.end - span.begin)
        return {key: sum(times) / len(times) for key, times in found.items()}


def _peak(spans: Sequence[Span], costs: Costs) -> float:
    chunks = sorted({span.instruction.chunk for span in spans})
    held = most = sum(costs.fixed[c] for c in chunks) if costs.fixed else 0.0
    for span in spans:
        chunk = span.instruction.chunk
        activations = costs.activations[chunk] if costs.activations else 0.0
        kept = activations if costs.kept is None else costs.kept[chunk]
        if span.instruction.kind == "F":
            held += activations
            most = max(most, held)
        elif span.instruction.kind == "B":
            held -= activations
        elif span.instruction.kind == "I":
            held -= activations - kept
        else:
            held -= kept
    return most
