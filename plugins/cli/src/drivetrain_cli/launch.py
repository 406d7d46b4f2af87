"""Starting the agent, showing the first rank live, forwarding signals, and ending all of it."""

from __future__ import annotations

import fcntl
import os
import pty
import signal
import subprocess
import sys
import termios
import threading
import time
import tty
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from types import FrameType
from typing import BinaryIO

from drivetrain_cli.descendants import adopt_orphans, kill_all, reap_orphans

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_agent(
    command: Sequence[str], environment: Mapping[str, str], log: Path, grace: float
) -> int:
    """Run ``command`` until it ends; answers its exit code, or 128 + n after signal n.

    Its output appears on our output as it comes, and in ``log``. It sees a terminal exactly where
    we have one, so that progress bars work. The first SIGINT, SIGTERM or SIGHUP is forwarded and
    gives the ranks ``grace`` seconds to finish; the second, or the end of that time, ends them and
    everything that they have started.
    """
    adopt_orphans()
    with log.open("wb") as file:
        taps = [_Tap(descriptor, file) for descriptor in (1, 2)]
        agent = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=taps[0].inlet,
            stderr=taps[1].inlet,
            start_new_session=True,  # a terminal's Ctrl-C reaches us alone, and ranks only once
        )
        for tap in taps:
            tap.start()
        with _forwarding(agent, grace) as signals:
            code = signals.wait()
        for tap in taps:
            tap.join(timeout=5)
    return 128 + signals.seen[0] if signals.seen else code


class _Signals:
    """Passes signals on to the agent, and kills all there is when time is up.

    Args:
        agent: the process below.
        grace: seconds from the first signal on.
    """

    def __init__(self, agent: subprocess.Popen[bytes], grace: float) -> None:
        self._agent = agent
        self._grace = grace
        self._deadline = float("inf")
        self.seen: list[int] = []

    def take(self, number: int, frame: FrameType | None) -> None:
        """Handle a signal."""
        self.seen.append(number)
        if len(self.seen) > 1:
            self._deadline = 0.0
            return
        self._deadline = time.monotonic() + self._grace
        self._agent.send_signal(number)

    def wait(self) -> int:
        """The agent's exit code, once nothing is left of a run that did not end well."""
        code = None
        while code is None and time.monotonic() < self._deadline:
            reap_orphans(self._agent.pid)
            with suppress(subprocess.TimeoutExpired):
                code = self._agent.wait(0.2)
        if code != 0 or self.seen:
            kill_all(self._agent.pid)
        return self._agent.wait()


@contextmanager
def _forwarding(agent: subprocess.Popen[bytes], grace: float) -> Iterator[_Signals]:
    """Handle signals; kill the agent when we fail ourselves."""
    signals = _Signals(agent, grace)
    before = {number: signal.signal(number, signals.take) for number in FORWARDED}
    try:
        yield signals
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if agent.poll() is None:
            kill_all(agent.pid)


class _Tap(threading.Thread):
    """Copies what a child writes to one of our own descriptors and to a file.

    Args:
        descriptor: 1 or 2, where the output is to appear.
        file: where it is kept.
    """

    def __init__(self, descriptor: int, file: BinaryIO) -> None:
        super().__init__(name=f"tap-{descriptor}", daemon=True)
        self._descriptor, self._file = descriptor, file
        self._begun = b""
        if os.isatty(descriptor):
            self._outlet, self.inlet = pty.openpty()
            size = fcntl.ioctl(descriptor, termios.TIOCGWINSZ, b"\0" * 8)
            fcntl.ioctl(self.inlet, termios.TIOCSWINSZ, size)
            tty.setraw(self.inlet)  # the terminal itself turns line feeds into new lines
        else:
            self._outlet, self.inlet = os.pipe()

    def start(self) -> None:
        os.close(self.inlet)  # the child has its own copy; ours would keep the end from being seen
        super().start()

    def run(self) -> None:
        shown = sys.stdout if self._descriptor == 1 else sys.stderr
        shown.flush()
        while True:
            try:
                data = os.read(self._outlet, 65536)
            except OSError:  # a pseudo-terminal's way to say that the other side is closed
                data = b""
            if not data:
                break
            self._keep(data)
            try:
                os.write(self._descriptor, data)
            except BrokenPipeError:  # nobody watches any more; the file still gets everything
                self._descriptor = os.open(os.devnull, os.O_WRONLY)
        os.close(self._outlet)
        self._keep(b"\n" if self._begun else b"")

    def _keep(self, data: bytes) -> None:
        """Write whole lines only, since the other stream writes to the same file."""
        lines, end, self._begun = (self._begun + data).rpartition(b"\n")
        self._file.write(lines + end)
        self._file.flush()
