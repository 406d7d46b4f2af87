"""Starting a job's hosts, showing what they say, and ending all of them when one has failed."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

FAILURE = "drivetrain_failure"
"""Key of the line in which ``drivetrain run --failure-format json`` says how a host has failed."""

_SETTLE_SECONDS = 15.0
"""How long the other hosts have to notice a failure by themselves, and to say what they saw."""

_TAIL_LINES = 12


@dataclass(frozen=True)
class Start:
    """A command that starts one host, or all of them.

    Args:
        who: the host, or the program that starts hosts.
        command: program and arguments.
        first_line: what it reads first from its standard input, which then stays open as long as
            the job is to go on; ``None`` where nothing reads it.
        environment: variables besides our own.
    """

    who: str
    command: Sequence[str]
    first_line: str | None = None
    environment: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class Failure:
    """How a host has failed.

    Args:
        host: its name.
        time_ns: when, by its clock.
        follows: whether another host's failure has brought it about.
        text: what happened.
    """

    host: str
    time_ns: int
    follows: bool
    text: str


@dataclass
class Outcome:
    """How a job has ended.

    Args:
        codes: exit status of every command.
        failures: what hosts have said, causes and older ones first.
        silent: commands that failed without such a word -> the last lines of their errors.
        signal: what has interrupted the job; 0 if nothing.
    """

    codes: dict[str, int]
    failures: list[Failure]
    silent: dict[str, list[str]]
    signal: int = 0


def run_all(starts: Sequence[Start], logs: Path, grace: float) -> Outcome:
    """Run all commands until they end; end the others soon after one has failed.

    The output of each appears on our own, line by line, with its name in front where there are
    several, and in ``logs/<who>.log``.

    Args:
        starts: the commands.
        logs: an existing folder.
        grace: seconds that they have to end when they are asked to; then they are killed.
    """
    running = [_Running(start, logs, prefixed=len(starts) > 1) for start in starts]
    interrupted = _wait(running, grace)
    for each in running:
        each.close()
    failures = [failure for each in running for failure in each.failures]
    failed = [each for each in running if each.code]
    return Outcome(
        codes={each.who: each.code for each in running},
        failures=sorted(failures, key=lambda f: (f.follows, f.time_ns)),
        silent={each.who: list(each.tail) for each in failed if not each.failures},
        signal=interrupted,
    )


def _wait(running: list[_Running], grace: float) -> int:
    """Until all have ended; answers the signal that has interrupted them."""
    ask = kill = float("inf")
    with _signals() as seen:
        while any(each.alive for each in running):
            now = time.monotonic()
            if seen and ask == float("inf"):
                ask = now
            if any(each.code for each in running if not each.alive):
                ask = min(ask, now + _SETTLE_SECONDS)
            if now >= ask and kill == float("inf"):
                kill = now + grace
                for each in running:
                    each.ask_to_end()
            if now >= kill or len(seen) > 1:
                for each in running:
                    each.kill()
            time.sleep(0.05)
    return seen[0] if seen else 0


@contextmanager
def _signals() -> Iterator[list[int]]:
    """Signals that come meanwhile."""
    seen: list[int] = []

    def take(number: int, _frame: FrameType | None) -> None:
        seen.append(number)

    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
    before = {number: signal.signal(number, take) for number in numbers}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


class _Running:
    """One command that runs, with threads that read what it says."""

    def __init__(self, start: Start, logs: Path, *, prefixed: bool) -> None:
        self.who = start.who
        self.failures: list[Failure] = []
        self.tail: deque[str] = deque(maxlen=_TAIL_LINES)
        self._prefix = f"[{start.who}] " if prefixed else ""
        self._log = (logs / f"{start.who.replace('/', '_')}.log").open("w", encoding="utf-8")
        self._lock = threading.Lock()
        self._process = subprocess.Popen(
            list(start.command),
            env={**os.environ, **start.environment},
            stdin=subprocess.DEVNULL if start.first_line is None else subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            errors="replace",
            start_new_session=True,
        )
        assert self._process.stdout is not None
        assert self._process.stderr is not None
        self._threads = [
            threading.Thread(target=self._read, args=pair, daemon=True)
            for pair in ((self._process.stdout, sys.stdout), (self._process.stderr, sys.stderr))
        ]
        for thread in self._threads:
            thread.start()
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):  # it has failed; its exit status tells
                self._process.stdin.write(f"{start.first_line}\n")
                self._process.stdin.flush()

    @property
    def alive(self) -> bool:
        return self._process.poll() is None

    @property
    def code(self) -> int:
        return self._process.poll() or 0

    def ask_to_end(self) -> None:
        if self._process.stdin is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
        elif self.alive:
            self._process.terminate()

    def kill(self) -> None:
        if self.alive:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)

    def close(self) -> None:
        for thread in self._threads:
            thread.join(timeout=5)
        self.ask_to_end()
        self._log.close()

    def _read(self, pipe: IO[str], shown: IO[str]) -> None:
        for line in pipe:
            failure = failure_in(line)
            with self._lock:
                if failure is not None:
                    self.failures.append(failure)
                    continue
                self._log.write(line)
                self._log.flush()
                if shown is sys.stderr:
                    self.tail.append(line.rstrip("\n"))
            with contextlib.suppress(BrokenPipeError):
                shown.write(f"{self._prefix}{line}")
                shown.flush()
        pipe.close()


def failure_in(line: str) -> Failure | None:
    """The failure that a line tells of, if it does; some launchers put a name in front of it."""
    start = line.find(f'{{"{FAILURE}"')
    if start < 0:
        return None
    try:
        content: dict[str, Any] = json.loads(line[start:])[FAILURE]
        return Failure(
            str(content["host"]),
            int(content["time_ns"]),
            bool(content["follows"]),
            str(content["text"]),
        )
    except (ValueError, KeyError, TypeError):
        return None
