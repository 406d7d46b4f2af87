"""Errors made on purpose, so that tests can see what a failing disk does to a job.

``DRIVETRAIN_IO_FAULT=write:5:EIO`` makes the fifth write of the process fail with EIO. The first
word is ``read`` or ``write``; the last one names an errno, or is ``short`` for a transfer that
moves half of what it was asked for, which is no error.
"""

from __future__ import annotations

import errno
import os
import threading
from dataclasses import dataclass, field

from drivetrain.errors import ConfigError

VARIABLE = "DRIVETRAIN_IO_FAULT"
SHORT = -1
"""The engines' code of a short transfer."""


@dataclass
class Fault:
    """One error to come.

    Args:
        writes: whether it strikes a write.
        countdown: which one it strikes, counted from now and from 1.
        code: an errno, or :data:`SHORT`.
    """

    writes: bool
    countdown: int
    code: int
    _lock: threading.Lock = field(default_factory=threading.Lock)

    @classmethod
    def parse(cls, text: str) -> Fault:
        """What the environment variable says.

        Raises:
            ConfigError: it says nothing that can be understood.
        """
        direction, _, rest = text.partition(":")
        number, _, name = rest.partition(":")
        code = SHORT if name == "short" else getattr(errno, name, None)
        if direction not in ("read", "write") or not number.isdecimal() or code is None:
            raise ConfigError(f"{VARIABLE}: expected e.g. write:5:EIO, got {text!r}")
        return cls(direction == "write", int(number), code)

    def strike(self, writes: bool) -> int:
        """The code for the request that is made now; 0 for none."""
        if writes != self.writes:
            return 0
        with self._lock:
            self.countdown -= 1
            return self.code if self.countdown == 0 else 0


class Faults:
    """The errors to come in this process; the environment is read at the first request."""

    planned: list[Fault] | None = None

    @classmethod
    def next(cls, writes: bool) -> int:
        """What is to become of the request that is made now: 0, an errno or :data:`SHORT`."""
        if cls.planned is None:
            text = os.environ.get(VARIABLE)
            cls.planned = [Fault.parse(text)] if text else []
        struck = [code for fault in cls.planned if (code := fault.strike(writes))]
        return struck[0] if struck else 0
