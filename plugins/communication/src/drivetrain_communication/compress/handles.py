"""A collective with something left to do when its data has arrived."""

from __future__ import annotations

from collections.abc import Callable

from drivetrain.contracts import DONE, Handle


class Continued:
    """The handle of a collective whose result is made from what it brought.

    Args:
        handle: of the collective.
        finish: makes the result; called once.
    """

    def __init__(self, handle: Handle, finish: Callable[[], object]) -> None:
        self._handle = handle
        self._finish: Callable[[], object] | None = finish

    def wait(self) -> None:
        """See :class:`~drivetrain.contracts.Handle`."""
        if self._finish is not None:
            self._handle.wait()
            self._finish()
            self._finish = None  # waits may repeat, and tensors need not be held longer


def then(handle: Handle, finish: Callable[[], object], *, asynchronous: bool) -> Handle:
    """Finish now, or when the handle that is returned is waited for."""
    if asynchronous:
        return Continued(handle, finish)
    handle.wait()
    finish()
    return DONE
