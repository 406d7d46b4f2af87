"""The plugin that builds engines that generate."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, ClassVar

from drivetrain.contracts import Plugin, Problem, Sections, hookimpl
from drivetrain_inference.section import PATH, InferenceSection

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts import Generates, InferenceRequest
    from drivetrain.job.job import Job
    from drivetrain.plan.plan import Plan


class Inference(Plugin):
    """Owns ``inference``."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: InferenceSection}

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        mode = plan.features().get("sparse_attention.mode", "dense")
        if mode == "dense":
            return []
        why = (
            f"sparse_attention.mode is {mode!r}, and the engine that generates attends to all "
            "tokens of a text, so results would not be the model's: leave sparse_attention out, "
            "or set its mode to dense"
        )
        return [Problem(PATH, why)]

    @hookimpl
    def build_inference(
        self, job: Job, module: torch.nn.Module, request: InferenceRequest
    ) -> Generates:
        from drivetrain_inference.cache.room import agreement
        from drivetrain_inference.engine import InferenceEngine
        from drivetrain_inference.loading import drafter_of, formats_of
        from drivetrain_inference.models.shared import SharedTokens

        section = self.section(InferenceSection)
        formats = formats_of(job, module, section)
        shared = SharedTokens.of(job)
        agree = agreement(job)
        engine = InferenceEngine(
            module, section, request, formats=formats, shared=shared, agree=agree
        )
        engine.lockstep = job.mesh.size("world") > 1
        if section.capture_decodes:
            engine.capture_with(job.accelerator.capture)
        job.on_close(engine.close)
        for name, path in section.adapters.items():
            engine.adapters.load(name, path)
        drafter = drafter_of(engine)
        if drafter is not None:
            engine.speculate(drafter)
        return engine
