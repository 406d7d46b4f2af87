"""The plugin: exact sums of gradients and norms, and refusals of what would break them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from drivetrain.contracts import Conflict, Plugin, Problem, Sections, hookimpl
from drivetrain_exact.section import PATH, ExactSection

if TYPE_CHECKING:
    from torch import nn

    from drivetrain.contracts import (
        CommunicatorLayer,
        GradientFilter,
        GradientNorm,
        StateReader,
        StateWriter,
        StepReport,
        UpdateRule,
    )
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain.plan.plan import Plan

_CUT = {
    "tp": "cut matrix products, whose parts are summed over ranks",
    "sp": "cut sequences, over which gradients are summed",
    "ep": "send tokens of several ranks to one expert",
}

_ROUNDED = {
    "zero_optimization.zero_quantized_weights": "forward would compute with rounded weights, in "
    "blocks that depend on the number of ranks",
    "zero_optimization.zero_quantized_gradients": "gradients would be rounded on their way",
    "communication.compress.enabled": "what travels would be rounded on its way",
}


class Exact(Plugin):
    """Owns ``exact``."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: ExactSection}

    # -- what cannot be kept ------------------------------------------------------------------

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        found = [
            Problem(f"{PATH}.enabled", f"{plan.layout.size(axis)} ranks along {axis} {why}")
            for axis, why in _CUT.items()
            if axis in plan.layout.axes and plan.layout.size(axis) > 1
        ]
        given = plan.config
        for key, plain in {
            "prescale_gradients": False,
            "gradient_predivide_factor": 1.0,
            "sparse_gradients": False,
            "communication_data_type": None,
        }.items():
            if given.get(key, plain) != plain:
                found.append(
                    Problem(
                        key,
                        f"rounds gradients before they are summed, so {PATH} "
                        "cannot keep their sum: leave it out",
                    )
                )
        return found

    def conflicts(self) -> Sequence[Conflict]:
        enabled = f"{PATH}.enabled"
        return [Conflict(enabled, True, path, True, why) for path, why in _ROUNDED.items()]

    def features(self) -> Mapping[str, object]:
        return {f"{PATH}.enabled": self.section(ExactSection).enabled}

    # -- set-up -------------------------------------------------------------------------------

    @hookimpl
    def wrap_communicator(self, job: Job) -> Sequence[CommunicatorLayer]:
        from drivetrain_exact.work import Work

        Work.begin(job, self.section(ExactSection))
        return ()

    @hookimpl
    def describe_parameters(self, job: Job, module: nn.Module) -> None:
        from drivetrain_exact.work import Work

        Work.of(job).describe(module)

    @hookimpl
    def wrap_update_rule(self, job: Job, rule: UpdateRule) -> UpdateRule:
        from drivetrain_exact.work import Work

        return Work.of(job).wrap(rule)

    @hookimpl
    def receive_gradients(self, job: Job) -> Sequence[GradientFilter]:
        from drivetrain_exact.work import Work

        return [Work.of(job).quantum.receive]

    @hookimpl
    def build_gradient_norm(self, job: Job) -> GradientNorm:
        from drivetrain_exact.work import Work

        return Work.of(job).norm()

    # -- the loop -----------------------------------------------------------------------------

    @hookimpl
    def prepare_inputs(self, engine: Engine) -> None:
        from drivetrain_exact.work import Work

        if engine.training and engine.optimizer is not None:
            Work.of(engine.job).begin_forward(engine)

    @hookimpl(tryfirst=True)
    def optimizer_step(self, engine: Engine) -> bool | None:
        from drivetrain_exact.work import Work

        return None if Work.of(engine.job).fits(engine) else False

    @hookimpl
    def step_end(self, engine: Engine, report: StepReport) -> None:
        from drivetrain_exact.work import Work

        Work.of(engine.job).quantum.end()

    # -- checkpoints --------------------------------------------------------------------------

    @hookimpl
    def save_state(self, engine: Engine, writer: StateWriter) -> None:
        from drivetrain_exact.work import Work

        for key, value in Work.of(engine.job).state().items():
            writer.put(f"{PATH}/{key}", value)

    @hookimpl
    def load_state(self, engine: Engine, reader: StateReader) -> None:
        from drivetrain_exact.work import Work

        work = Work.of(engine.job)
        work.load({key: reader.get(f"{PATH}/{key}") for key in work.state()})
