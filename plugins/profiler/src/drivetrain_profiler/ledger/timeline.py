"""One rank's time as a row of intervals without gaps, each in one column.

The thread that opened the job has one timeline; threads that autograd runs backward on take turns
with it, so they write into it, too. What other threads do, such as updates on the host, goes on
beside it and takes no time of the run's.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from types import TracebackType
from typing import Any, Protocol

import torch

from drivetrain.job.spans import Ledger, Span
from drivetrain_profiler.places import in_backward

START, IDLE, COMPUTE, DATA = "start", "idle", "compute", "data"
COLUMNS = {
    "data": DATA,
    "checkpoint": "checkpoint",
    "compile": "compile",
    "offload wait": "offload",
}
"""The column of each span that is no computation."""

_WHOLE = ("checkpoint", "compile")
"""Columns that take all that goes on in their spans."""

PLAIN = (COMPUTE, "offload", DATA, "checkpoint", "compile", START, IDLE)
"""Every column beside those of communication, in the order in which they are shown."""


def exchange(axis: str, purpose: str) -> str:
    """The column of communication along an axis for a purpose."""
    return f"communication {axis} {purpose}"


def is_exchange(column: str) -> bool:
    """Whether a column is of communication."""
    return column.startswith("communication ")


class Clock(Protocol):
    """Takes marks in the work of a device, and tells seconds between two of them."""

    def mark(self) -> Any:
        """Now, for work that is asked for from here on."""

    def seconds(self, begin: Any, end: Any) -> float:
        """From one mark to another; both are reached."""

    def reached(self, mark: Any) -> bool:
        """Whether the device is there."""

    def wait(self, mark: Any) -> None:
        """Return once the device is there."""


class HostClock:
    """For a device that has done its work when an operator returns."""

    mark = staticmethod(time.perf_counter)

    def seconds(self, begin: float, end: float) -> float:
        """From one mark to another."""
        return end - begin

    def reached(self, mark: float) -> bool:
        """It is."""
        return True

    def wait(self, mark: float) -> None:
        """Nothing to wait for."""


class DeviceClock:
    """For a device with a queue: marks are events in the stream that computes.

    So an interval is the time in which that stream had reached one mark and not the next: waits of
    the host that the queue hides take none.
    """

    def __init__(self, device: torch.device) -> None:
        self._device = device

    def mark(self) -> torch.Event:
        """A new event in the current stream."""
        event = torch.Event(device=self._device.type, enable_timing=True)
        event.record()
        return event

    def seconds(self, begin: torch.Event, end: torch.Event) -> float:
        """From one event to another; the device measures milliseconds."""
        return float(begin.elapsed_time(end)) / 1e3

    def reached(self, mark: torch.Event) -> bool:
        """Whether the stream is there."""
        return bool(mark.query())

    def wait(self, mark: torch.Event) -> None:
        """Return once the stream is there."""
        mark.synchronize()


@dataclass(frozen=True)
class Interval:
    """A piece of a timeline.

    Args:
        column: what it counts as.
        name: the span, or the collective, that it is a part of.
        begin: seconds since the timeline began.
        seconds: how long it took.
    """

    column: str
    name: str
    begin: float
    seconds: float


class Window:
    """What a timeline has between two cuts: a mark for every change of columns."""

    def __init__(self, first: tuple[str, str, Any]) -> None:
        self.changes: list[tuple[str, str, Any]] = [first]
        self.end: Any = None

    def intervals(self, clock: Clock, begin: float) -> Iterator[Interval]:
        """Its intervals; the device has reached its end.

        Args:
            clock: has made its marks.
            begin: of the window, in seconds since the timeline began.
        """
        following = [mark for _, _, mark in self.changes[1:]] + [self.end]
        for (column, name, mark), after in zip(self.changes, following, strict=True):
            seconds = clock.seconds(mark, after)
            yield Interval(column, name, begin, seconds)
            begin += seconds


class Timeline:
    """The intervals of this rank, from the moment in which it is made.

    Args:
        clock: of its device.
    """

    def __init__(self, clock: Clock) -> None:
        self.clock = clock
        self._thread = threading.get_ident()
        self._stack: list[tuple[str, str]] = [(START, START)]
        self._window = Window((START, START, clock.mark()))

    @property
    def is_here(self) -> bool:
        """Whether the calling thread is the one whose time this is."""
        return threading.get_ident() == self._thread or in_backward()

    def enter(self, column: str, name: str) -> None:
        """Time counts under ``column`` from here on."""
        if column in (COMPUTE, DATA) and self._stack[0][0] == START:
            self._stack[0] = (IDLE, IDLE)  # the first micro-batch ends the start
        around = self._stack[-1][0]
        if around in _WHOLE or (around == START and column not in _WHOLE):
            column = around  # ranks that wait for each other in a save, say, wait for the save
        self._stack.append((column, name))
        self._window.changes.append((column, name, self.clock.mark()))

    def leave(self) -> None:
        """Time counts as before the matching :meth:`enter` from here on."""
        self._stack.pop()
        self._window.changes.append((*self._stack[-1], self.clock.mark()))

    def cut(self) -> Window:
        """What there was since the last cut; what is under way goes on in the next window."""
        window, mark = self._window, self.clock.mark()
        window.end = mark
        self._window = Window((*self._stack[-1], mark))
        return window


class RecordedLedger(Ledger):
    """A job's ledger whose spans are in a timeline, too."""

    def __init__(self, timeline: Timeline) -> None:
        super().__init__()
        self._timeline = timeline

    def span(self, name: str) -> Span:
        return _Recorded(self, name, self._timeline)


class _Recorded(Span):
    __slots__ = ("_here", "_timeline")

    def __init__(self, ledger: Ledger, name: str, timeline: Timeline) -> None:
        super().__init__(ledger, name)
        self._timeline = timeline
        self._here = False

    def __enter__(self) -> None:
        self._here = self._timeline.is_here
        if self._here:
            self._timeline.enter(COLUMNS.get(self.name, COMPUTE), self.name)
        super().__enter__()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        super().__exit__(kind, error, traceback)
        if self._here:
            self._timeline.leave()
