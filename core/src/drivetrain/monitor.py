"""What monitors share: the numbers of a step that they show, and when they are written.

A monitor is a plugin derived from :class:`Monitor`. Scripts show numbers of their own by
:func:`write_events`.
"""

from __future__ import annotations

import atexit
import logging
import time
from abc import abstractmethod
from collections.abc import Iterable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NamedTuple, Protocol
from uuid import uuid4
from weakref import WeakKeyDictionary

from drivetrain.contracts.plugin.plugin import Plugin, hookimpl
from drivetrain.errors import ConfigError, DrivetrainError
from drivetrain.sections.observability import WallClockBreakdown

if TYPE_CHECKING:
    from drivetrain.contracts.loop.step_report import StepReport
    from drivetrain.engine.engine import Engine

logger = logging.getLogger("drivetrain.monitor")

_MOST_EVENTS = 1000

_SECRET = ("api_key", "token", "password", "secret")

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
    """Base of plugins that show the progress of training; rank 0 writes (:meth:`writes_on`).

    Reports are kept for a while before their values are read, so that a monitor does not make every
    step wait for the device. What is left is written when the job closes or the process ends. A
    writer that fails is closed with one warning, and training goes on without it.

    Attributes:
        most_steps: largest number of reports that are kept before they are written.
        most_seconds: longest time for which they are kept.
        detailed: whether all values of a report are shown, or only those that DeepSpeed shows.
    """

    most_steps: ClassVar[int] = 100
    most_seconds: ClassVar[float] = 30.0
    detailed: ClassVar[bool] = False

    @abstractmethod
    def open_writer(self, engine: Engine, number: int) -> Writer:
        """Called at the first event of an engine, on ranks that write.

        Args:
            engine: whose events come.
            number: which of the job's engines it is, from 0.

        Raises:
            DrivetrainError: the config cannot be carried out here.
            Exception: anything else is said once, and training goes on without this monitor.
        """

    def writes_on(self, rank: int) -> bool:
        """Whether a rank writes: the first one."""
        return rank == 0

    @hookimpl
    def step_end(self, engine: Engine, report: StepReport) -> None:
        if self.writes_on(engine.job.rank):
            self.buffer(engine).add_report(report)

    def buffer(self, engine: Engine) -> _Buffer:
        """What is not yet written of an engine's events."""
        buffers = _buffers.setdefault(engine, {})
        if self.name not in buffers:
            buffers[self.name] = _Buffer(self, engine)
            engine.job.on_close(buffers[self.name].close)
        return buffers[self.name]


def write_events(engine: Engine, events: Iterable[tuple[str, float, int]]) -> None:
    """Show numbers of a script's own in every monitor of the engine's job.

    On ranks that do not write, nothing happens.

    Args:
        engine: the engine.
        events: (name, value, place on the x axis) of each; monitors use
            ``engine.global_samples`` as x, and some want it to rise.
    """
    shown = [Event(*event) for event in events]
    for plugin in engine.job.hub.plugins.values():
        if isinstance(plugin, Monitor) and plugin.writes_on(engine.job.rank):
            plugin.buffer(engine).add_events(shown)


def events_of(report: StepReport, *, with_times: bool, detailed: bool = False) -> list[Event]:
    """What monitors show of a step, under DeepSpeed's names.

    Args:
        report: of the step.
        with_times: include the time split, in milliseconds.
        detailed: include what DeepSpeed does not show.
    """
    values = {"Train/Samples/lr": report.learning_rates[0]}
    if report.loss is not None:
        values["Train/Samples/train_loss"] = report.loss
    if report.loss_scale != 1.0:
        values["Train/Samples/loss_scale"] = report.loss_scale
    for span, name in _TIMES.items() if with_times else ():
        if span in report.times:
            values[f"Train/Samples/elapsed_time_ms_{name}"] = 1e3 * report.times[span]
    for name, value in report.values.items():  # single numbers; lists are for other views
        if isinstance(value, float):
            values[f"Train/Samples/{name}"] = value
    if detailed:
        values |= {f"Train/Samples/{name}": value for name, value in _details(report)}
    return [Event(name, value, report.samples) for name, value in values.items()]


def _details(report: StepReport) -> Iterable[tuple[str, float]]:
    yield "step", report.step
    yield "skipped", float(not report.applied)
    yield "seconds", report.seconds
    yield "samples_per_second", report.samples_per_second
    if report.step_tokens:
        yield "tokens_per_second", report.tokens_per_second
    if report.gradient_norm is not None:
        yield "gradient_norm", report.gradient_norm
    for number, rate in enumerate(report.learning_rates[1:], 1):
        yield f"lr_{number}", rate


def shown_config(engine: Engine) -> dict[str, object]:
    """The config of an engine's job, for others to see: without keys, tokens and passwords."""

    def without(value: object) -> object:
        if not isinstance(value, dict):
            return value
        return {k: without(v) for k, v in value.items() if not str(k).endswith(_SECRET)}

    return {key: without(value) for key, value in engine.job.plan.config.items()}


def writable_folder(path: Path, source: str, rank: int = 0) -> Path:
    """Create the folder ``path`` if need be, and make sure that files can be made in it.

    Args:
        path: relative to the working directory, or absolute.
        source: the config path that it comes from.
        rank: who asks.

    Raises:
        ConfigError: the system does not allow it.
    """
    probe = path / f".drivetrain-probe-{uuid4().hex}"  # others may do the same
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        reason = error.strerror or error
        raise ConfigError(
            f"{source}: rank {rank} cannot write to {path.absolute()} ({reason}); name a folder "
            "that can be written"
        ) from error
    return path


class _Buffer:
    """Events of one engine on their way to one writer."""

    def __init__(self, monitor: Monitor, engine: Engine) -> None:
        self._monitor = monitor
        self._with_times = engine.job.plan.section(WallClockBreakdown).root
        self._waiting: list[StepReport | Event] = []
        self._written_at = time.monotonic()
        self._writer: Writer | None = None
        try:
            self._writer = monitor.open_writer(engine, engine.job.engines.index(engine))
        except DrivetrainError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever a monitor's library may raise
            self._give_up(error)
        atexit.register(self.close)

    def add_report(self, report: StepReport) -> None:
        self._add([report])

    def add_events(self, events: list[Event]) -> None:
        self._add(events)

    def close(self) -> None:
        atexit.unregister(self.close)
        self._write()
        writer, self._writer = self._writer, None
        if writer is not None:
            writer.close()

    def _add(self, items: Sequence[StepReport | Event]) -> None:
        if self._writer is None:
            return
        self._waiting += items
        waited = time.monotonic() - self._written_at
        many = len(self._waiting) >= _MOST_EVENTS or self._steps() >= self._monitor.most_steps
        if many or waited >= self._monitor.most_seconds:
            self._write()

    def _steps(self) -> int:
        return sum(not isinstance(item, Event) for item in self._waiting)

    def _write(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._written_at = time.monotonic()
        if self._writer is None or not waiting:
            return
        events: list[Event] = []
        for item in waiting:
            if isinstance(item, Event):
                events.append(item)
            else:
                detailed = self._monitor.detailed
                events += events_of(item, with_times=self._with_times, detailed=detailed)
        try:
            self._writer.write(events)
        except Exception as error:  # noqa: BLE001 - whatever a monitor's library may raise
            self._give_up(error)

    def _give_up(self, error: Exception) -> None:
        logger.warning(
            "%s shows nothing more, training goes on: %s: %s",
            self._monitor.name,
            type(error).__name__,
            error,
        )
        writer, self._writer = self._writer, None
        if writer is not None:
            with suppress(Exception):
                writer.close()


_buffers: WeakKeyDictionary[Engine, dict[str, _Buffer]] = WeakKeyDictionary()
