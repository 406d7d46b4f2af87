"""What Prometheus and the live page are told."""

from __future__ import annotations

import time
from collections import deque

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from drivetrain_server.workers.tickets import Part

_SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
_LATELY = 10.0
"""Seconds over which a rate is a mean."""


class Metrics:
    """Counters of one server; those of several in one process do not mix."""

    def __init__(self) -> None:
        self._registry = registry = CollectorRegistry()
        prefix = "drivetrain_server"
        self.requests = Counter(
            f"{prefix}_requests", "Requests.", ("endpoint", "status"), registry=registry
        )
        self._prompt = Counter(f"{prefix}_prompt_tokens", "Tokens of prompts.", registry=registry)
        self._tokens = Counter(f"{prefix}_tokens", "Tokens generated.", registry=registry)
        self._cached = Counter(
            f"{prefix}_cached_tokens", "Tokens of prompts found in the cache.", registry=registry
        )
        self._ended = Counter(f"{prefix}_results", "Results, by end.", ("end",), registry=registry)
        self._first = Histogram(
            f"{prefix}_first_token_seconds", "Time to the first token.", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        self._whole = Histogram(
            f"{prefix}_request_seconds", "Time of whole requests.", buckets=_SECONDS,
            registry=registry,
        )  # fmt: skip
        worker = ("worker",)
        self.gauges = {
            name: Gauge(f"{prefix}_{name}", text, worker, registry=registry)
            for name, text in (
                ("up", "Whether the worker takes requests."),
                ("restarts", "How often the worker was started again."),
                ("running", "Sequences that run."),
                ("waiting", "Sequences that wait."),
                ("cache_used", "Share of the cache's blocks in use."),
                ("cache_tokens", "Tokens that the cache has room for."),
                ("preemptions", "How often a sequence gave its blocks back."),
            )
        }
        self._recent: deque[tuple[float, int]] = deque()
        self._first_times: deque[float] = deque(maxlen=200)
        self.total = 0

    def heard(self, part: Part) -> None:
        """Count a part that a worker has sent."""
        self._tokens.inc(part.tokens)
        self.total += part.tokens
        now = time.monotonic()
        if self._recent and now - self._recent[-1][0] < 0.1:
            self._recent[-1] = (self._recent[-1][0], self._recent[-1][1] + part.tokens)
        else:
            self._recent.append((now, part.tokens))
            while self._recent[0][0] < now - _LATELY:
                self._recent.popleft()
        if part.reason is not None:
            self._ended.labels(part.reason).inc()
            self._cached.inc(part.cached)

    def note_prompt(self, tokens: int) -> None:
        """Count tokens of prompts."""
        self._prompt.inc(tokens)

    def note_first_token(self, seconds: float) -> None:
        """Note how long a first token took."""
        self._first.observe(seconds)
        self._first_times.append(seconds)

    def note_request_end(self, seconds: float) -> None:
        """Note how long a request took."""
        self._whole.observe(seconds)

    def tokens_per_second(self) -> float:
        """Tokens generated per second lately."""
        now = time.monotonic()
        counted = [(when, tokens) for when, tokens in self._recent if when > now - _LATELY]
        if not counted:
            return 0.0
        return sum(tokens for _, tokens in counted) / max(1.0, now - counted[0][0])

    def median_first_token(self) -> float | None:
        """Seconds to the first token of the last 200 requests, the median."""
        known = sorted(self._first_times)
        return known[len(known) // 2] if known else None

    def text(self) -> bytes:
        """All of it, as Prometheus reads it."""
        return generate_latest(self._registry)
