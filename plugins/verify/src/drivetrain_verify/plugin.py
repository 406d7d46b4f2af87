"""The plugin: follows the first steps of the engine that trains."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from drivetrain.contracts import Phase, Plugin, Problem, Sections, Transform, hookimpl
from drivetrain_verify.section import PATH, VerifySection

if TYPE_CHECKING:
    from torch import nn

    from drivetrain.contracts import StepReport
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain.plan.plan import Plan
    from drivetrain_verify.work import Work

_AXES = ("pp", "tp", "sp", "ep")
_ROUNDING = (
    "zero_optimization.zero_quantized_weights",
    "zero_optimization.zero_quantized_gradients",
)


class Verify(Plugin):
    """Owns ``verify``."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: VerifySection}

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        cut = [a for a in _AXES if a in plan.layout.axes and plan.layout.size(a) > 1]
        why = "ranks have parts of the model or of sequences, and none sees what one process would"
        text = "compares data-parallel plans: leave out the section here, or what shares out"
        found = [Problem(f"{PATH}.enabled", f"{text} {axis} ({why})") for axis in cut]
        rounding = [key for key in _ROUNDING if plan.features().get(key)]
        why = "rounds far more than the precision does, so that every parameter would be off"
        return found + [
            Problem(f"{PATH}.enabled", f"{key} {why}: compare without it") for key in rounding
        ]

    def features(self) -> Mapping[str, object]:
        return {f"{PATH}.enabled": self.section(VerifySection).enabled}

    @hookimpl(tryfirst=True)
    def transform_module(self, job: Job, module: nn.Module, training: bool) -> Sequence[Transform]:
        if not training:
            return []
        work = self._work(job)
        work.copy_client(module)
        return [Transform(Phase.SURROUND, work.follow)]

    @hookimpl
    def prepare_inputs(self, engine: Engine) -> None:
        work = self._work(engine.job)
        if work.runs and engine.training and engine.optimizer is not None:
            work.begin_window(engine)

    @hookimpl(tryfirst=True)
    def optimizer_step(self, engine: Engine) -> None:
        work = self._work(engine.job)
        if work.runs:
            work.end_window(engine)

    @hookimpl
    def step_end(self, engine: Engine, report: StepReport) -> None:
        work = self._work(engine.job)
        if work.runs:
            work.end_step(engine, report.applied)

    def _work(self, job: Job) -> Work:
        from drivetrain_verify.work import Work

        return Work.of(job, self.section(VerifySection))
