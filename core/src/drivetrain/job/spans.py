"""The time ledger: where the seconds of a step went, by name."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from time import perf_counter
from types import TracebackType


@dataclass
class SpanTime:
    """Time spent under one name.

    Args:
        exclusive: seconds in its spans, without what other spans inside took.
        inclusive: seconds in its spans altogether; a name nested in itself counts once.
        count: number of spans.
    """

    exclusive: float = 0.0
    inclusive: float = 0.0
    count: int = 0


class Ledger:
    """Adds up the seconds that a process spends in named spans.

    Spans nest per thread, so autograd's threads have their own. A span costs one to two
    microseconds. It measures the host: work queued on a device is not waited for.
    """

    def __init__(self) -> None:
        self._times: dict[str, SpanTime] = {}
        self._lock = threading.Lock()
        self._thread = _Stack()

    def span(self, name: str) -> Span:
        """A context manager that counts its block under ``name``."""
        return Span(self, name)

    def times(self) -> dict[str, SpanTime]:
        """What has been counted since the last :meth:`take`, by name, in order of first end."""
        with self._lock:
            return dict(self._times)

    def take(self) -> dict[str, float]:
        """Exclusive seconds by name, and start anew; spans still open count when they end."""
        with self._lock:
            times, self._times = self._times, {}
        return {name: time.exclusive for name, time in times.items()}

    def _enter(self, span: Span) -> None:
        self._thread.spans.append(span)

    def _exit(self, span: Span, elapsed: float) -> None:
        spans = self._thread.spans
        spans.pop()
        if spans:
            spans[-1].inside += elapsed
        nested = bool(spans) and any(outer.name == span.name for outer in spans)
        with self._lock:
            time = self._times.get(span.name)
            if time is None:
                time = self._times[span.name] = SpanTime()
            time.exclusive += elapsed - span.inside
            time.count += 1
            if not nested:
                time.inclusive += elapsed


class Span:
    """One block of time; made by :meth:`Ledger.span`."""

    __slots__ = ("_ledger", "_start", "inside", "name")

    def __init__(self, ledger: Ledger, name: str) -> None:
        self.name = name
        self.inside = 0.0
        self._ledger = ledger
        self._start = 0.0

    def __enter__(self) -> None:
        self._ledger._enter(self)
        self._start = perf_counter()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ledger._exit(self, perf_counter() - self._start)


class _Stack(threading.local):
    def __init__(self) -> None:
        self.spans: list[Span] = []
