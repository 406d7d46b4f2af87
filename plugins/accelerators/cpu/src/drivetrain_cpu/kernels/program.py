"""Calls of kernels, noted once and made again as one: what a graph is on other devices.

A decoder makes some hundred calls a token, each of which costs Python several microseconds. All of
their addresses and sizes are the same for every token, if memory is, so they can be noted down.
"""

from __future__ import annotations

import ctypes
import logging
import threading
from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_int, c_int64
from ctypes import c_void_p as pointer
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from drivetrain_cpu.kernels.call import succeed

logger = logging.getLogger("drivetrain.cpu")


class _Call(Structure):
    """``Call`` of program.cpp."""

    _fields_ = [("function", pointer), ("arguments", pointer)]


class _Noted(threading.local):
    """Calls of this thread that are being noted; ``None`` while nothing is."""

    calls: list[tuple[int, Structure]] | None = None
    kept: list[object]


_noted = _Noted()


class Native:
    """A kernel that takes the address of one structure, and returns a status.

    Args:
        function: the library's.
    """

    def __init__(self, function: Any) -> None:
        function.argtypes, function.restype = [pointer], c_int
        self._function = function
        self._address = int(ctypes.cast(function, pointer).value or 0)

    def __call__(self, call: Structure, *tensors: torch.Tensor | None) -> None:
        """Run it; ``tensors`` are those whose memory the structure names.

        Raises:
            MemoryError: scratch memory could not be allocated.
        """
        if _noted.calls is not None:
            _noted.calls.append((self._address, call))
            _noted.kept.extend(tensors)
        succeed(self._function(byref(call)))


class NotRepeatableError(Exception):
    """A function does something that a list of calls of kernels does not repeat; says what."""


class _OnlyKernels(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Lets through new memory and views; whatever else computes would be missing in a replay."""

    _NEW = ("aten::new_empty", "aten::empty_like", "aten::empty", "aten::empty_strided")

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        schema = func._schema
        aliases = [each.alias_info for each in schema.returns]
        view = bool(aliases) and all(a is not None and not a.is_write for a in aliases)
        if not view and schema.name not in self._NEW:
            raise NotRepeatableError(f"{schema.name} is computed by torch")
        found = func(*args, **(kwargs or {}))
        _noted.kept.append(found)
        return found


def capture(function: Callable[[], None], library: ctypes.CDLL) -> Callable[[], None] | None:
    """Run ``function`` and return what makes the same calls of kernels again.

    ``None``, with a line in the log, if it computes anything else. What it reads and writes lies in
    the same memory each time, which the returned function keeps.

    Args:
        function: calls kernels for serving, whose structures have a field ``threads``.
        library: they are in it.
    """
    _noted.calls, _noted.kept = [], []
    try:
        with _OnlyKernels():  # type: ignore[no-untyped-call]
            function()
        calls, kept = _noted.calls, _noted.kept
    except NotRepeatableError as error:
        logger.info("calls are not noted, as %s", error)
        return None
    finally:
        _noted.calls, _noted.kept = None, []
    arguments = [ctypes.addressof(call) for _, call in calls]
    table = (_Call * len(calls))(
        *[_Call(address, at) for (address, _), at in zip(calls, arguments, strict=True)]
    )
    run = library.dt_run
    run.argtypes, run.restype = [POINTER(_Call), c_int64, c_int], c_int
    # As large a team as the largest call wants; its threads are woken once.
    threads = max((call.threads for _, call in calls), default=1)

    def replay() -> None:
        succeed(run(table, len(table), threads))

    replay.__dict__["kept"] = (calls, kept)  # structures and tensors live as long as it
    return replay
