"""Recording when a stage runs its instructions."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from drivetrain_pipeline.schedules.instruction import Instruction

if TYPE_CHECKING:
    from drivetrain_pipeline.schedules.streams import Schedule


class Recorder:
    """The times of one stage's instructions in one step.

    Times are seconds of the machine's wall clock, so those of stages on several machines fit
    together as well as their clocks do.

    Args:
        wait: called before a time is taken; waits until the device has done what it was given.
            Without it, a device that runs behind the host is not seen.
    """

    def __init__(self, wait: Callable[[], None] | None = None) -> None:
        self._wait = wait
        self._spans: list[tuple[str, float, float]] = []
        self._open: tuple[Instruction, float] | None = None

    def begin(self, instruction: Instruction) -> None:
        """Note that ``instruction`` begins now."""
        self._open = (instruction, self._now())

    def end(self, instruction: Instruction) -> None:
        """Note that ``instruction`` is finished now.

        Raises:
            ValueError: it is not the one that began.
        """
        if self._open is None or self._open[0] != instruction:
            began = "nothing" if self._open is None else str(self._open[0])
            raise ValueError(f"{instruction} ends, but {began} began")
        self.add(instruction, self._open[1], self._now())
        self._open = None

    def add(self, instruction: Instruction, begin: float, end: float) -> None:
        """Add an instruction whose times (seconds) were measured otherwise."""
        self._spans.append((str(instruction), begin, end))

    def spans(self) -> list[tuple[str, float, float]]:
        """(Instruction as text, begin, end) in order: plain data that ranks can exchange."""
        return list(self._spans)

    def finish(self, schedule: Schedule) -> None:
        """The step is over, of which ``schedule`` was run; here nothing is made of it."""

    def clear(self) -> None:
        """Forget all; the next step begins."""
        self._spans.clear()
        self._open = None

    def _now(self) -> float:
        if self._wait is not None:
            self._wait()
        return time.time()
