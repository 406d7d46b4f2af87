"""The plugin that keeps the state of a job in memory beside its workers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from drivetrain.contracts import Plugin, Problem, Sections, hookimpl
from drivetrain_elasticity.section import SurvivalSection

if TYPE_CHECKING:
    from drivetrain.contracts import StepReport
    from drivetrain.engine.engine import Engine
    from drivetrain.plan.plan import Plan

PLACE = "keeper://survival"
TAG = "copy"
"""One tag: the copy before is removed once the new one is whole."""


class Survival(Plugin):
    """Owns ``survival``.

    A copy is a checkpoint like any other, made of fragments by all ranks and committed as a whole;
    only its files are in memory, in a process that is no worker, and on several hosts also in that
    of the next host. So a rank or a host that is lost takes nothing with it, and a job goes on with
    another number of ranks as it does from a disk.
    """

    name = "survival"
    sections: ClassVar[Sections] = {"survival": SurvivalSection}

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        if "checkpoint.background" not in plan.hub.plugins:
            return ()
        reason = (
            "writes its copies at once, and cannot be combined with checkpoint.background, which "
            "would hold each copy twice; leave out one of them"
        )
        return [Problem("survival", reason)]

    @hookimpl
    def step_end(self, engine: Engine, report: StepReport) -> None:
        if engine is not engine.job.engines[0]:  # one engine is the job's
            return
        section = self.section(SurvivalSection)
        if section.spike is not None:
            from drivetrain_elasticity.spikes import watch_losses

            if watch_losses(engine, section.spike).go_back_after(engine, report.loss):
                return
        if engine.global_steps % section.every == 0:
            from drivetrain_elasticity.hosts import join_hosts

            join_hosts(engine.job)
            engine.save_checkpoint(PLACE, TAG)

    def features(self) -> Mapping[str, object]:
        return {"survival.enabled": self.section(SurvivalSection).enabled}
