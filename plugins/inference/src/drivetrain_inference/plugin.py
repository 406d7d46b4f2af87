"""The plugin that builds engines that generate."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from drivetrain.contracts import Plugin, Sections, hookimpl
from drivetrain_inference.section import PATH, InferenceSection

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts import Generates, InferenceRequest
    from drivetrain.job.job import Job


class Inference(Plugin):
    """Owns ``inference``."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: InferenceSection}

    @hookimpl
    def build_inference(
        self, job: Job, module: torch.nn.Module, request: InferenceRequest
    ) -> Generates:
        from drivetrain_inference.engine import InferenceEngine
        from drivetrain_inference.loading import drafter_of, formats_of
        from drivetrain_inference.models.shared import SharedTokens

        section = self.section(InferenceSection)
        formats = formats_of(job, module, section)
        shared = SharedTokens.of(job)
        engine = InferenceEngine(module, section, request, formats=formats, shared=shared)
        engine.lockstep = job.mesh.size("world") > 1
        job.on_close(engine.close)
        drafter = drafter_of(engine)
        if drafter is not None:
            engine.speculate(drafter)
        return engine
