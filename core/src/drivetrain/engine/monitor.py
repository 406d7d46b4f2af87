"""What monitors share: the numbers of a step that they show, and when they are written."""

from __future__ import annotations

import atexit
import time
from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol
from weakref import WeakKeyDictionary

from drivetrain.contracts.plugin.plugin import Plugin, hookimpl
from drivetrain.errors import ConfigError
from drivetrain.sections.observability import WallClockBreakdown

if TYPE_CHECKING:
    from drivetrain.contracts.loop.step_report import StepReport
    from drivetrain.engine.engine import Engine

_MOST_REPORTS = 100
_MOST_SECONDS = 30.0

_TIMES = {
    "forward": "forward",
    "backward": "backward",
    "communication wait": "backward_allreduce",
    "step": "step",
}
"""Span -> how DeepSpeed calls it."""


class Event(NamedTuple):
    """One number to show.

    Args:
        name: e.g. ``"Train/Samples/lr"``.
        value: the number.
        samples: its place on the x axis: global samples seen so far.
    """

    name: str
    value: float
    samples: int


class Writer(Protocol):
    """Where a monitor's events go."""

    def write(self, events: Sequence[Event]) -> None:
        """Take events, in order of steps, and make them visible to readers."""

    def close(self) -> None:
        """Release files and connections."""


class Monitor(Plugin):
    """Base of plugins that show the progress of training; rank 0 writes.

    Reports are kept for up to 100 steps or 30 seconds before their values are read, so that a
    monitor does not make every step wait for the device. What is left is written when the job
    closes or the process ends.
    """

    @abstractmethod
    def open_writer(self, number: int) -> Writer:
        """Called at the first step of an engine, on rank 0.

        Args:
            number: which of the job's engines it is, from 0.
        """

    @hookimpl
    def step_end(self, engine: Engine, report: StepReport) -> None:
        if engine.job.rank != 0:
            return
        buffers = _buffers.setdefault(engine, {})
        if self.name not in buffers:
            writer = self.open_writer(engine.job.engines.index(engine))
            times = engine.job.plan.section(WallClockBreakdown).root
            buffers[self.name] = _Buffer(writer, with_times=times)
            engine.job.on_close(buffers[self.name].close)
        buffers[self.name].add(report)


def events_of(report: StepReport, *, with_times: bool) -> list[Event]:
    """What monitors show of a step, under DeepSpeed's names.

    Args:
        report: of the step.
        with_times: include the time split, in milliseconds.
    """
    values = {"Train/Samples/lr": report.learning_rates[0]}
    if report.loss is not None:
        values["Train/Samples/train_loss"] = report.loss
    if report.loss_scale != 1.0:
        values["Train/Samples/loss_scale"] = report.loss_scale
    for span, name in _TIMES.items() if with_times else ():
        if span in report.times:
            values[f"Train/Samples/elapsed_time_ms_{name}"] = 1e3 * report.times[span]
    return [Event(name, value, report.samples) for name, value in values.items()]


def writable_folder(path: Path, source: str) -> Path:
    """Create the folder ``path`` if need be, and make sure that files can be made in it.

    Args:
        path: relative to the working directory, or absolute.
        source: the config path that it comes from.

    Raises:
        ConfigError: the system does not allow it.
    """
    probe = path / ".drivetrain-probe"
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"{source}: rank 0 cannot write to {path.absolute()} ({reason}); name a folder that "
            "can be written"
        ) from error
    return path


class _Buffer:
    def __init__(self, writer: Writer, *, with_times: bool) -> None:
        self._writer = writer
        self._with_times = with_times
        self._reports: list[StepReport] = []
        self._written_at = time.monotonic()
        self._open = True
        atexit.register(self.close)

    def add(self, report: StepReport) -> None:
        self._reports.append(report)
        waited = time.monotonic() - self._written_at
        if len(self._reports) >= _MOST_REPORTS or waited >= _MOST_SECONDS:
            self._write()

    def close(self) -> None:
        if not self._open:
            return
        self._open = False
        atexit.unregister(self.close)
        self._write()
        self._writer.close()

    def _write(self) -> None:
        reports, self._reports = self._reports, []
        self._written_at = time.monotonic()
        self._writer.write(
            [event for r in reports for event in events_of(r, with_times=self._with_times)]
        )


_buffers: WeakKeyDictionary[Engine, dict[str, _Buffer]] = WeakKeyDictionary()
