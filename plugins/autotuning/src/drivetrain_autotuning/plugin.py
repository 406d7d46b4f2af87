"""The plugin: measures some steps of a trial, and ends it."""

from __future__ import annotations

import json
import logging
import os
import statistics
import sys
from pathlib import Path
from typing import TYPE_CHECKING, ClassVar, NoReturn

from drivetrain.contracts import Plugin, Purpose, Sections, Tag, hookimpl
from drivetrain_autotuning.section import PATH, AutotuningSection

if TYPE_CHECKING:
    from drivetrain.contracts import StepReport
    from drivetrain.engine.engine import Engine


class Autotuning(Plugin):
    """Owns ``autotuning``; takes part in trials of ``drivetrain tune`` alone."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: AutotuningSection}

    @hookimpl(trylast=True)
    def step_end(self, engine: Engine, report: StepReport) -> None:
        section = self.section(AutotuningSection)
        if section.trial is None or engine is not engine.job.engines[0]:
            return
        seconds = _seconds.setdefault(id(engine.job), [])
        if report.step >= section.start_profile_step:
            seconds.append(report.seconds)
        if report.step < section.end_profile_step:
            return
        if engine.job.rank == 0:
            step = statistics.median(seconds)
            found = {
                "seconds": step,
                "throughput": report.step_samples / step,
                "samples": report.step_samples,
                "peak": report.memory()[1],
            }
            Path(section.trial).write_text(json.dumps(found), "utf-8")
        _leave(engine)


def _leave(engine: Engine) -> NoReturn:
    """End the process with success, on every rank, when all have come here."""
    job = engine.job
    job.communicator.barrier("world", Tag(Purpose.CONTROL, site="end of a trial"))
    engine.destroy()
    job.close()
    logging.shutdown()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


_seconds: dict[int, list[float]] = {}
"""A trial's process runs one job; the plugin itself keeps no state of it."""
