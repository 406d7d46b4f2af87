"""Sees what the spans of a job do not: loaders of the script's own, and what is compiled."""

from __future__ import annotations

import sys
from typing import Any

from torch.utils.data import dataloader

from drivetrain_profiler.ledger.timeline import Timeline


class LoaderWatch:
    """While it lasts, the time in which this rank waits for a ``DataLoader`` of torch is data's.

    Scripts iterate over loaders by themselves, so there is no other place that sees them all.

    Args:
        timeline: of this rank.
    """

    def __init__(self, timeline: Timeline) -> None:
        iterator: Any = dataloader._BaseDataLoaderIter
        self._iterator = iterator
        self._before = before = iterator.__next__

        def timed(self: Any) -> Any:
            if not timeline.is_here:
                return before(self)
            timeline.enter("data", "loader")
            try:
                return before(self)
            finally:
                timeline.leave()

        self._timed = timed
        iterator.__next__ = timed

    def close(self) -> None:
        """Leave loaders as they were, unless somebody else has changed them since."""
        if self._iterator.__next__ is self._timed:
            self._iterator.__next__ = self._before


class CompileWatch:
    """While it lasts, the time in which torch compiles is compilation's.

    Args:
        timeline: of this rank.
    """

    def __init__(self, timeline: Timeline) -> None:
        self._timeline = timeline
        self._handler: Any = None
        self._inside = 0

    def look(self) -> None:
        """Begin, once torch's compiler is there; it is imported by whoever compiles."""
        if "torch._dynamo.callback" not in sys.modules:
            return
        handler = self._handler = sys.modules["torch._dynamo.callback"].callback_handler
        if self._begin not in handler.start_callbacks:  # torch._dynamo.reset() drops them, too
            handler.register_start_callback(self._begin)
            handler.register_end_callback(self._end)

    def close(self) -> None:
        """Watch no longer."""
        if self._handler is not None and self._begin in self._handler.start_callbacks:
            self._handler.remove_start_callback(self._begin)
            self._handler.remove_end_callback(self._end)

    def _begin(self, _: Any) -> None:
        if self._timeline.is_here:
            self._inside += 1
            self._timeline.enter("compile", "compile")

    def _end(self, _: Any) -> None:
        if self._inside and self._timeline.is_here:
            self._inside -= 1
            self._timeline.leave()
