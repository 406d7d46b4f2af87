"""Timers that scripts start and stop themselves: ``deepspeed.utils.timer``."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Sequence

from deepspeed._parts.accelerator import get_accelerator
from deepspeed._parts.logs import log_dist
from drivetrain.errors import TrainingError

logger = logging.getLogger("deepspeed")

_GIB = 1 << 30


class Timer:
    """One interval that is measured again and again; made by :class:`SynchronizedWallClockTimer`.

    Args:
        name: shown in the log.
    """

    def __init__(self, name: str) -> None:
        self.name_ = name
        self.started_ = False
        self._start = 0.0
        self._records: list[float] = []  # seconds

    def start(self) -> None:
        """Wait for the device, then begin to measure.

        Raises:
            TrainingError: it runs already.
        """
        if self.started_:
            raise TrainingError(f"timer {self.name_!r} runs already; stop it first")
        self._start = _now()
        self.started_ = True

    def stop(self, reset: bool = False, record: bool = False) -> None:
        """Wait for the device, then end what :meth:`start` began.

        Args:
            reset: forget what was measured before.
            record: accepted; every interval is kept for :meth:`mean`.

        Raises:
            TrainingError: it does not run.
        """
        if not self.started_:
            raise TrainingError(f"timer {self.name_!r} does not run; start it first")
        if reset:
            self._records.clear()
        self._records.append(_now() - self._start)
        self.started_ = False

    def reset(self) -> None:
        """Forget what was measured, and stop."""
        self.started_ = False
        self._records.clear()

    def elapsed(self, reset: bool = True) -> float:
        """Milliseconds that were measured since the last reset; one that runs goes on.

        Args:
            reset: forget them.
        """
        running = self.started_
        if running:
            self.stop()
        total = 1e3 * sum(self._records)
        if reset:
            self.reset()
        if running:
            self.start()
        return total

    def mean(self) -> float:
        """Mean milliseconds of an interval; 0 before the first one ends."""
        return 1e3 * sum(self._records) / len(self._records) if self._records else 0.0


def trim_mean(data: Sequence[float], trim_percent: float) -> float:
    """The mean without the smallest and the largest values; 0 of none.

    Args:
        data: left as it is.
        trim_percent: share of the values that is left out at each end, below 0.5.

    Raises:
        ValueError: the share is not in [0, 0.5).
    """
    if not 0 <= trim_percent < 0.5:
        raise ValueError(f"trim_percent is {trim_percent}, expected at least 0 and below 0.5")
    out = int(len(data) * trim_percent)
    kept = sorted(data)[out : len(data) - out]
    return sum(kept) / len(kept) if kept else 0.0


class SynchronizedWallClockTimer:
    """Timers by name, each of which waits for the device where it starts and stops."""

    def __init__(self) -> None:
        self.timers: dict[str, Timer] = {}

    def __call__(self, name: str) -> Timer:
        """The timer of that name, made at its first use."""
        return self.timers.setdefault(name, Timer(name))

    def get_timers(self) -> dict[str, Timer]:
        """All of them, by name."""
        return self.timers

    def has_timer(self, name: str) -> bool:
        """Whether a timer of that name was used."""
        return name in self.timers

    @staticmethod
    def memory_usage() -> str:
        """The device's memory now and at its peak, as text."""
        accelerator = get_accelerator()
        now, peak = accelerator.memory_allocated() / _GIB, accelerator.max_memory_allocated() / _GIB
        return f"memory allocated {now:.4f} GiB, at most {peak:.4f} GiB"

    def log(
        self,
        names: Sequence[str],
        normalizer: float = 1.0,
        reset: bool = True,
        memory_breakdown: bool = False,
        ranks: Sequence[int] | None = None,
    ) -> None:
        """Log what timers have measured, in milliseconds; names without a timer are left out.

        Args:
            names: of timers.
            normalizer: by which times are divided.
            reset: forget them.
            memory_breakdown: log memory as well.
            ranks: that log; the first one if ``None``.

        Raises:
            ValueError: ``normalizer`` is not positive.
        """
        _check(normalizer)
        found = [
            f"{name}: {self.timers[name].elapsed(reset=reset) / normalizer:.2f}"
            for name in names
            if name in self.timers
        ]
        memory = f" | {self.memory_usage()}" if memory_breakdown else ""
        log_dist(f"time (ms) | {' | '.join(found)}{memory}", ranks=list(ranks or [0]))

    def get_mean(
        self, names: Sequence[str], normalizer: float = 1.0, reset: bool = True
    ) -> dict[str, float]:
        """Mean milliseconds of each timer; names without a timer are left out.

        Args:
            names: of timers.
            normalizer: by which times are divided.
            reset: forget what was measured.

        Raises:
            ValueError: ``normalizer`` is not positive.
        """
        _check(normalizer)
        means = {n: self.timers[n].mean() / normalizer for n in names if n in self.timers}
        for name in means if reset else ():
            self.timers[name].reset()
        return means


class NoopTimer:
    """A timer, and a set of them, that measure nothing."""

    def __call__(self, name: str) -> NoopTimer:
        """Itself."""
        return self

    def start(self) -> None:
        """Do nothing."""

    def stop(self, **_: object) -> None:
        """Do nothing."""

    reset = start

    def log(self, *_: object, **__: object) -> None:
        """Do nothing."""

    def elapsed(self, **_: object) -> float:
        """0."""
        return 0.0

    mean = elapsed

    def has_timer(self, name: str) -> bool:
        """True, as every name has this one."""
        return True

    def get_timers(self) -> dict[str, Timer]:
        """None."""
        return {}

    def get_mean(self, *_: object, **__: object) -> dict[str, float]:
        """None."""
        return {}


class ThroughputTimer:
    """Samples per second of a loop.

    Args:
        config: the section ``timers.throughput``; measures nothing if its ``enabled`` is false.
        batch_size: samples of one step over all ranks.
        start_step: steps at the beginning that are not counted.
        steps_per_output: a line is logged so often; never if ``None`` or 0.
        monitor_memory: accepted; ``see_memory_usage`` logs memory.
        logging_fn: called with the line; the log's ``info`` by default.

    Attributes:
        initialized: whether it was ever started.
        start_time: of the latest micro-batch; 0 while its step is not counted.
        end_time: of the latest counted micro-batch.
    """

    def __init__(
        self,
        config: object,
        batch_size: int | None,
        start_step: int = 2,
        steps_per_output: int | None = None,
        monitor_memory: bool = False,
        logging_fn: Callable[[str], None] | None = None,
    ) -> None:
        self.enabled = bool(getattr(config, "enabled", True))
        self.batch_size = max(batch_size or 1, 1)
        self.start_step = start_step
        self.steps_per_output = steps_per_output
        self.logging = logging_fn or logger.info
        self.started = self.initialized = False
        self.start_time = self.end_time = 0.0
        self.epoch_count = self.micro_step_count = self.global_step_count = 0
        self.total_elapsed_time = self.step_elapsed_time = 0.0

    def update_epoch_count(self) -> None:
        """Begin another epoch."""
        self.epoch_count += 1
        self.micro_step_count = 0

    def start(self) -> None:
        """Begin a micro-batch."""
        if self.enabled:
            self.started = self.initialized = True
            self.start_time = _now() if self.global_step_count >= self.start_step else 0.0

    def stop(self, global_step: bool = False, report_speed: bool = True) -> None:
        """End a micro-batch.

        Args:
            global_step: it was the last one before an update.
            report_speed: whether a line may be logged.
        """
        if not self.enabled or not self.started:
            return
        self.started = False
        self.micro_step_count += 1
        counted = self.start_time > 0
        if counted:
            self.end_time = _now()
            self.step_elapsed_time += self.end_time - self.start_time
            self.total_elapsed_time += self.end_time - self.start_time
        if not global_step:
            return
        self.global_step_count += 1
        if not counted:
            return
        often = self.steps_per_output
        if report_speed and often and self.global_step_count % often == 0:
            current = self.batch_size / self.step_elapsed_time
            self.logging(
                f"epoch {self.epoch_count}, step {self.global_step_count}: "
                f"{self.avg_samples_per_sec():.4f} samples per second on average, {current:.4f} now"
            )
        self.step_elapsed_time = 0.0

    def avg_samples_per_sec(self) -> float:
        """Samples per second over all counted steps; minus infinity before the first one."""
        steps = self.global_step_count - self.start_step
        if steps <= 0 or self.total_elapsed_time <= 0:
            return float("-inf")
        return self.batch_size * steps / self.total_elapsed_time


def _now() -> float:
    get_accelerator().synchronize()
    return time.perf_counter()


def _check(normalizer: float) -> None:
    if normalizer <= 0:
        raise ValueError(f"normalizer must be positive, got {normalizer}")
