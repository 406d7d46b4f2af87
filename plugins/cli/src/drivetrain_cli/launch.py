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
import tty
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import BinaryIO

FORWARDED = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def run_agent(command: Sequence[str], environment: Mapping[str, str], log: Path) -> int:
    """Run ``command`` until it ends; answers its exit code, or 128 + n after signal n.

    Its output appears on our output as it comes, and in ``log``. It sees a terminal exactly where
    we have one, so that progress bars work. The first SIGINT, SIGTERM or SIGHUP is forwarded and
    gives the ranks time to finish; the second ends them at once.
    """
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
        with _forwarding(agent) as signals:
            code = agent.wait()
        for tap in taps:
            tap.join(timeout=5)
    return 128 + signals[0] if signals else code


@contextmanager
def _forwarding(agent: subprocess.Popen[bytes]) -> Iterator[list[int]]:
    """Pass signals on to the agent; kill it when a second one comes, or when we fail ourselves.

    Yields the numbers of the signals so far.
    """
    seen: list[int] = []

    def forward(number: int, frame: FrameType | None) -> None:
        seen.append(number)
        agent.send_signal(number if len(seen) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, forward) for number in FORWARDED}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
        if agent.poll() is None:
            agent.kill()


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
