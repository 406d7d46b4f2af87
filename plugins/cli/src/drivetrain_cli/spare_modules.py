"""Which modules a spare has loaded: some from the start, and what its ranks turn out to need.

A rank tells the spare the name of each module that it looks for, through a socket that only the two
of them have. Of these the spare loads those of torch, of Drivetrain and of its plugins, so that
ranks after a failure find them loaded. No config is read for it and nothing of
the job runs: a module is imported, no more.

Copies of the spare are complete only if it has one thread and no device, and a module can start or
open something when it is imported. So a copy that is thrown away imports first, and what leaves a
thread or a descriptor behind there, or raises, is not loaded.
"""

from __future__ import annotations

import importlib
import os
import re
import signal
import socket
import sys
from collections.abc import Iterable, Sequence
from contextlib import suppress
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import get_args

from drivetrain.plan.registry import Group, Registry

MODULES = (
    *("torch", "torch.distributed", "torch._dynamo", "numpy"),
    *("drivetrain", "drivetrain.contracts", "drivetrain.engine.compose", "drivetrain.checkpoint"),
)
"""What all ranks need. ``torch._dynamo`` is what the first optimizer imports, and half of it."""

FOUNDATIONS = ("torch", "drivetrain", "packaging", "pydantic", "pluggy")
"""Packages below every plugin."""

TRIAL_SECONDS = 60
"""After so long a trial is killed: a module that hangs is not loaded."""


def packages() -> frozenset[str]:
    """Those below every plugin, and those installed that offer something to Drivetrain."""
    registry = Registry.installed()
    offered = [entry for group in get_args(Group) for entry in registry.entries(group)]
    return frozenset({*FOUNDATIONS, *(re.split("[.:]", e.value)[0] for e in offered)})


class Reporter:
    """Tells a spare, in a rank, what is imported; a finder that itself never finds anything.

    Args:
        spare: a socket that is not waited for: a name that does not fit is left out.
        known: top-level packages whose modules are told.
    """

    def __init__(self, spare: socket.socket, known: frozenset[str]) -> None:
        self._spare, self._known = spare, known

    def find_spec(
        self, name: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """Tell the name (``importlib.abc.MetaPathFinder``)."""
        if name.partition(".")[0] in self._known:
            with suppress(OSError):  # the spare has ended, or is behind
                self._spare.send(name.encode())
        return None


def load(names: Iterable[str]) -> None:
    """Import modules; those that do not exist are left out."""
    for name in names:
        with suppress(ImportError):  # ranks also look for what is not installed
            importlib.import_module(name)


def try_in_a_copy(names: Iterable[str]) -> int:
    """Start a process that imports modules, and ends with 0 if nothing else has come of it."""
    process = os.fork()
    if process:
        return process
    status = 1
    try:
        signal.alarm(TRIAL_SECONDS)
        quiet = os.open(os.devnull, os.O_WRONLY)
        for stream in (1, 2):
            os.dup2(quiet, stream)
        before = _open_and_running()
        load(names)
        status = 0 if _open_and_running() <= before else 1
    finally:
        os._exit(status)


def _open_and_running() -> set[str]:
    """Threads of this process, and what its descriptors are of."""
    found = {path.name for path in Path("/proc/self/task").iterdir()}
    for path in Path("/proc/self/fd").iterdir():
        with suppress(OSError):  # the one by which they are read
            found.add(f"{path.name}: {path.readlink()}")
    return found


def missing(names: Iterable[str]) -> list[str]:
    """Those that are not loaded."""
    return [name for name in names if name not in sys.modules]
