"""Steps that may never end, such as joining ranks that have died, carried out beside the caller."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")


class _Helper:
    """A thread that waits for steps.

    It is started before it is needed, since an interpreter that ends starts no thread any more, and
    as a daemon, so that a step which never ends does not keep the process.
    """

    def __init__(self) -> None:
        self.owner = os.getpid()
        self.busy = False
        self._steps: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._run, name="drivetrain-aside", daemon=True).start()

    def begin(self, step: Callable[[], T]) -> Future[T]:
        """Carry out ``step`` soon; must not be called while the last one runs."""
        self.busy = True
        future: Future[T] = Future()

        def carry_out() -> None:
            try:
                result = step()
            except BaseException as error:  # noqa: BLE001 - the caller gets it
                self.busy = False
                future.set_exception(error)
            else:
                self.busy = False
                future.set_result(result)

        self._steps.put(carry_out)
        return future

    def _run(self) -> None:
        while True:
            self._steps.get()()


_helpers: list[_Helper] = []


def prepare() -> None:
    """Start the thread of this process unless it is there and free."""
    if not _helpers or _helpers[-1].owner != os.getpid() or _helpers[-1].busy:
        _helpers[:] = [_Helper()]


def begin(step: Callable[[], T]) -> Future[T]:
    """Carry out ``step`` beside the caller."""
    prepare()
    return _helpers[-1].begin(step)


def within(seconds: float, step: Callable[[], object]) -> bool:
    """Carry out ``step``; false if that takes longer, when it is left to itself."""
    try:
        done = begin(step)
    except RuntimeError:  # an interpreter that ends starts no thread, and the one it has is stuck
        return False
    try:
        done.result(seconds)
    except TimeoutError:
        if done.done():
            raise
        return False
    return True
