"""The plugin that splits a model into stages, and runs micro-batches through them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from drivetrain.contracts import (
    Atom,
    AxisRequest,
    Phase,
    Plugin,
    Problem,
    Sections,
    Transform,
    hookimpl,
)
from drivetrain_pipeline.section import PATH, PipelineSection

if TYPE_CHECKING:
    from torch import nn

    from drivetrain.contracts import Runner
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain.plan.plan import Plan


class Pipeline(Plugin):
    """Owns ``pipeline``."""

    name = PATH
    after = ("tensor_parallel", "moe")
    """They decide by the whole model what each of their ranks has of a layer; see ``partition``."""
    sections: ClassVar[Sections] = {PATH: PipelineSection}

    @hookimpl
    def mesh_axes(self, plan: Plan) -> Sequence[AxisRequest]:
        from drivetrain_pipeline.planning import section_of

        return [Atom("pp", section_of(plan).stages, f"{PATH}.stages")]

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        from drivetrain_pipeline.planning import problems, section_of

        return problems(section_of(plan), plan)

    @hookimpl
    def transform_module(self, job: Job, module: nn.Module) -> Sequence[Transform]:
        from drivetrain_pipeline.agreement import check_same_file
        from drivetrain_pipeline.building import build, partition

        section = self._settled(job)
        check_same_file(job, section)
        return [
            Transform(Phase.ADAPT, lambda model: build(job, model, section)),
            Transform(Phase.PARTITION, lambda model: partition(job, model, section)),
        ]

    @hookimpl
    def describe_parameters(self, job: Job, module: nn.Module) -> None:
        from drivetrain_pipeline.building import describe

        describe(job, module)

    @hookimpl
    def build_runner(self, job: Job, engine: Engine) -> Runner | None:
        from drivetrain_pipeline.building import runner

        return runner(job, engine, self._settled(job))

    def _settled(self, job: Job) -> PipelineSection:
        from drivetrain_pipeline.planning import micro_batches_of, section_of, settled

        return settled(section_of(job.plan), micro_batches_of(job.plan))

    def features(self) -> Mapping[str, object]:
        section = self.section(PipelineSection)
        return {f"{PATH}.stages": section.stages, f"{PATH}.schedule": section.schedule}

    def feature_values(self) -> Mapping[str, Sequence[object]]:
        return {f"{PATH}.schedule": ("1f1b", "zb_h1")}
