"""Ending every process that a run has started, whatever it does and whoever started it."""

from __future__ import annotations

import ctypes
import os
import signal
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

_PR_SET_CHILD_SUBREAPER = 36

_MOST_SECONDS = 10.0
"""How long to wait for killed processes; one that waits in the kernel ends when it returns."""


def adopt_orphans() -> None:
    """Make this process the parent of descendants whose own parent ends, where the system can."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)


def reap_orphans(keep: int) -> None:
    """Let go of descendants that have ended, but for the child ``keep``, which its owner awaits."""
    if not hasattr(os, "waitid"):  # macOS, where nothing is adopted either
        return
    with suppress(ChildProcessError):
        while (ended := os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)) is not None:
            if ended.si_pid == keep:
                return
            os.waitpid(ended.si_pid, 0)


def kill_all(child: int) -> None:
    """Kill the session leader ``child`` and everything that it and its children have started.

    A stopped process is killed as well; children that come meanwhile are found in the next round.
    """
    with suppress(ProcessLookupError):
        os.killpg(child, signal.SIGKILL)
    deadline = time.monotonic() + _MOST_SECONDS
    while (living := list(_descendants(os.getpid()))) and time.monotonic() < deadline:
        for process in living:
            with suppress(ProcessLookupError):
                os.kill(process, signal.SIGKILL)
        time.sleep(0.02)
        reap_orphans(child)


def _descendants(ancestor: int) -> Iterator[int]:
    """The living processes below ``ancestor``; none where the system does not list processes."""
    children: dict[int, list[int]] = {}
    dead = set()
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):  # it has ended meanwhile
            state, parent, *_ = stat.read_text().rpartition(")")[2].split()
            process = int(stat.parent.name)
            children.setdefault(int(parent), []).append(process)
            if state in "ZX":  # which may keep its children for a moment
                dead.add(process)
    found = list(children.get(ancestor, []))
    for process in found:  # grows while it is walked through
        found += children.get(process, [])
        if process not in dead:
            yield process
