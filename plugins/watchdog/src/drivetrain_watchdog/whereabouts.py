"""Where this rank is: the module that runs, the line of the script, and if it gets on at all."""

from __future__ import annotations

import os
import sys
import sysconfig
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

import drivetrain
from drivetrain.states.units import units

if TYPE_CHECKING:
    from drivetrain.job.job import Job

_WORKED = 0.001
"""Seconds of processor time between two looks from which on a rank gets on."""

_LIBRARIES = tuple(
    f"{Path(folder)}{os.sep}"
    for folder in {
        *sysconfig.get_paths().values(),
        str(Path(torch.__file__).parent),
        str(Path(drivetrain.__file__).parent),
    }
)
_PACKAGES = ("drivetrain", "deepspeed", "torch")


class Whereabouts:
    """What messages say of this rank.

    Args:
        job: has the counters of steps.

    Attributes:
        now: the unit of the model that runs, and in which pass; or ``backward``, ``step``, or
            nothing outside of the engine.
        caught: an exception that has left the engine, and that the script has caught.
    """

    def __init__(self, job: Job) -> None:
        self.now = ""
        self.caught = ""
        self._job_steps: Callable[[], int] = lambda: job.progress.steps
        self._thread = threading.get_ident()
        self._native = threading.get_native_id()
        self._clock = self._clock_of_thread()
        self._worked = self._clock()
        self._children = 0.0
        self._moved = time.monotonic()

    @property
    def steps(self) -> int:
        """Steps that the job has ended."""
        return self._job_steps()

    # -- the module ------------------------------------------------------------------------------

    def follow(self, module: nn.Module) -> nn.Module:
        """Put hooks on the repeated blocks of a module, and on itself."""
        for unit in units(module):
            if unit.module is not module:
                self._follow(unit.module, unit.name)
        self._follow(module, type(module).__name__, whole=True)
        return module

    def _follow(self, module: nn.Module, name: str, *, whole: bool = False) -> None:
        forward, backward = f"{name}, forward", f"{name}, backward"

        def enter(*_: object) -> None:
            self.now = forward

        def backward_begins(_gradient: torch.Tensor) -> None:
            self.now = backward

        def leave(_module: nn.Module, _inputs: object, output: object) -> None:
            error = sys.exc_info()[1]
            if whole and error is not None:
                self.note(error)
            self.now = ""
            first = _first_tensor(output)
            if first is not None and first.requires_grad:
                first.register_hook(backward_begins)  # type: ignore[no-untyped-call]

        module.register_forward_pre_hook(enter)
        module.register_forward_hook(leave, always_call=whole)

    @contextmanager
    def inside(self, what: str) -> Iterator[None]:
        """The engine does ``what`` meanwhile."""
        self.now = what
        try:
            yield
        except Exception as error:
            self.note(error)
            raise
        finally:
            self.now = ""

    def note(self, error: BaseException) -> None:
        """Keep what an exception was that leaves the engine."""
        said = " ".join(f"{type(error).__name__}: {error}".split())
        place = self.now or "the engine"
        self.caught = f"{said[:300]} (it left {place}, in step {self.steps + 1})"

    # -- the script ------------------------------------------------------------------------------

    def line(self) -> str:
        """Which line of the script the job's thread is in."""
        frame = sys._current_frames().get(self._thread)
        innermost = frame
        while frame is not None and _is_library(frame):
            frame = frame.f_back
        frame = frame or innermost
        if frame is None:
            return "its thread has ended"
        code = frame.f_code
        return f"{Path(code.co_filename).name}:{frame.f_lineno} in {code.co_name}"

    # -- getting on ------------------------------------------------------------------------------

    def still(self) -> float:
        """Seconds since the job's thread was last seen to get on.

        It gets on while it uses a processor, waits for a disk, or processes below this one (a
        compiler, workers that load data) use a processor. How often others are looked at decides
        how exact this is.
        """
        now, worked = time.monotonic(), self._clock()
        if worked - self._worked > _WORKED or self._waits_for_disk():
            self._moved = now
        elif now - self._moved > 1.0:
            children = _seconds_of_children()
            if children - self._children > _WORKED:
                self._moved = now
            self._children = children
        self._worked = worked
        return now - self._moved

    def _clock_of_thread(self) -> Callable[[], float]:
        if hasattr(time, "pthread_getcpuclockid"):
            clock = time.pthread_getcpuclockid(self._thread)
            return lambda: _read_clock(clock)
        return time.process_time

    def _waits_for_disk(self) -> bool:
        return state_of(f"{os.getpid()}/task/{self._native}") == "D"


def state_of(process: str) -> str:
    """The letter that Linux has for what a process does; empty where it is not known."""
    try:
        text = Path(f"/proc/{process}/stat").read_text("utf-8", errors="replace")
    except OSError:
        return ""
    return text.rpartition(")")[2].split()[0]


def _read_clock(clock: int) -> float:
    try:
        return time.clock_gettime(clock)
    except OSError:  # the thread has ended
        return 0.0


def _seconds_of_children() -> float:
    """Processor time of all living processes below this one."""
    ticks, found = 0, [str(os.getpid())]
    while found:
        process = found.pop()
        try:
            for task in Path(f"/proc/{process}/task").iterdir():
                found += (task / "children").read_text("utf-8").split()
            if process != str(os.getpid()):
                fields = Path(f"/proc/{process}/stat").read_text("utf-8").rpartition(")")[2]
                ticks += sum(map(int, fields.split()[11:13]))
        except OSError:  # it has ended, or the system has no such files
            continue
    return ticks / _TICKS


_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def _is_library(frame: FrameType) -> bool:
    package = str(frame.f_globals.get("__name__", "")).partition(".")[0]
    if package.startswith(_PACKAGES):
        return True
    return frame.f_code.co_filename.startswith((*_LIBRARIES, "<"))


def _first_tensor(output: Any) -> torch.Tensor | None:
    """A tensor of a module's output through which backward comes in."""
    while isinstance(output, tuple | list | Mapping) and output:
        output = next(iter(output.values() if isinstance(output, Mapping) else output))
    return output if isinstance(output, torch.Tensor) else None
