"""A signal by which another thread stops what the job's thread does."""

from __future__ import annotations

import signal
import threading
from types import FrameType
from typing import Any

_SIGNAL = int(getattr(signal, "SIGRTMIN", 0)) + 7
"""What interrupts the job's thread. Nothing else is known to use it."""


class Interruption:
    """A signal to the thread that makes this, if it is the main one and the system has such.

    Args:
        take: called there.
    """

    def __init__(self, take: Any) -> None:
        self._take = take
        self._thread = threading.get_ident()
        self._before: Any = None
        self._works = _SIGNAL > 7 and threading.current_thread() is threading.main_thread()
        if self._works:
            self._before = signal.signal(_SIGNAL, self._handle)

    def send(self) -> None:
        """Interrupt whatever the thread does in Python, or in a call of the system."""
        if self._works:
            signal.pthread_kill(self._thread, _SIGNAL)

    def restore(self) -> None:
        """Have what was there before; only from the main thread."""
        if self._works and threading.current_thread() is threading.main_thread():
            self._works = False
            signal.signal(_SIGNAL, self._before)

    def _handle(self, _number: int, _frame: FrameType | None) -> None:
        self._take()
