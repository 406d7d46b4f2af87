"""The ``checkpoint.background`` section: saving while training goes on."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar
from weakref import WeakKeyDictionary

from pydantic import Field

from drivetrain.contracts import Bool, Plugin, PositiveFloat, Section, Sections, hookimpl

if TYPE_CHECKING:
    from drivetrain.checkpoint.format.commit import PendingSave
    from drivetrain.contracts import StepReport
    from drivetrain.engine.engine import Engine
    from drivetrain_checkpoint_tools.background import BackgroundWriter

PATH = "checkpoint.background"


class BackgroundSection(Section):
    """Saving in the background, from a copy in host memory."""

    enabled: Bool = Field(default=True, description="Write in the background.")
    vote_timeout: PositiveFloat = Field(
        default=1800.0,
        description="Seconds that rank 0, when it has written its own part, waits for those of "
        "ranks that are alive before the save has failed.",
    )


class BackgroundSaves(Plugin):
    """Owns ``checkpoint.background``."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: BackgroundSection}

    @hookimpl
    def carry_out_save(self, engine: Engine, pending: PendingSave) -> bool:
        from drivetrain_checkpoint_tools.background import BackgroundWriter, wait_for_saves

        writer = writers.get(engine)
        with engine.job.span("checkpoint"):
            if writer is None:
                timeout = self.section(BackgroundSection).vote_timeout
                writer = writers[engine] = BackgroundWriter(engine.job, timeout)
                engine.on_destroy(writer.wait)
                engine.job.on_close(writer.close)
            else:
                wait_for_saves(engine)  # no rank writes while another still ends the last save
            writer.submit(pending)
        return True

    @hookimpl
    def step_end(self, engine: Engine, report: StepReport) -> None:
        if engine in writers:
            writers[engine].raise_error()


writers: WeakKeyDictionary[Engine, BackgroundWriter] = WeakKeyDictionary()
"""The writer of every engine that has saved."""
