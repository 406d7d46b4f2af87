"""Leaving in time: a signal makes all ranks save a checkpoint after the step under way, and end."""

from __future__ import annotations

import logging
import signal
import threading
from collections.abc import Mapping
from contextlib import suppress
from types import FrameType
from typing import TYPE_CHECKING, Any, ClassVar

from drivetrain.contracts import Plugin, Purpose, Sections, Tag, hookimpl
from drivetrain_elasticity.section import PreemptionSection

if TYPE_CHECKING:
    from drivetrain.contracts import StepReport
    from drivetrain.engine.engine import Engine

logger = logging.getLogger("drivetrain.preemption")


class Preempted(SystemExit):
    """Ends the process with status 0, after a checkpoint was saved.

    Args:
        folder: where the checkpoint is.
    """

    def __init__(self, folder: str) -> None:
        super().__init__(0)
        self.folder = folder


class Preemption(Plugin):
    """Owns ``preemption``.

    A scheduler sends the signal to ranks in no order, and some may get none. So ranks tell each
    other at the end of every step, in a collective of one number that has the whole next step to
    arrive, and all of them save after the same step: the one after that in which the first rank
    saw the signal.
    """

    name = "preemption"
    sections: ClassVar[Sections] = {"preemption": PreemptionSection}

    def __init__(self, *arguments: Any, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._told = False
        self._before: dict[int, Any] = {}
        self._asked: Any = None
        self._number: Any = None

    @hookimpl
    def step_end(self, engine: Engine, report: StepReport) -> None:
        import torch

        if engine is not engine.job.engines[0]:  # one engine decides for the job
            return
        if not self._before:
            self._listen(engine)
        if self._asked is not None:
            self._asked.wait()
            if float(self._number) > 0:
                self._leave(engine)
        self._number = torch.tensor(float(self._told), device=engine.device)
        tag = Tag(Purpose.CONTROL, site="preemption")
        self._asked = engine.job.communicator.all_reduce(
            self._number, "world", tag, asynchronous=True
        )

    def features(self) -> Mapping[str, object]:
        return {"preemption.enabled": self.section(PreemptionSection).enabled}

    def _listen(self, engine: Engine) -> None:
        if threading.current_thread() is not threading.main_thread():
            logger.warning("preemption: signals reach the main thread only, and this is another")
            return
        for name in self.section(PreemptionSection).signals:
            number = getattr(signal, name)
            self._before[number] = signal.signal(number, self._take)
        engine.job.on_close(self._stop)

    def _take(self, number: int, _frame: FrameType | None) -> None:
        self._told = True

    def _stop(self) -> None:
        asked, self._asked = self._asked, None
        if asked is not None:
            with suppress(Exception):  # the job may be failing
                asked.wait()
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()

    def _leave(self, engine: Engine) -> None:
        self._asked = None
        folder = self.section(PreemptionSection).save_dir
        path = engine.save_checkpoint(folder)
        if engine.job.rank == 0:
            logger.warning("preemption: saved %s after step %d", path, engine.global_steps)
        engine.job.close()
        raise Preempted(folder)
