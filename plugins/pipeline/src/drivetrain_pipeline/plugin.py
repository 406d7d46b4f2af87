"""The plugin that splits a model into stages, and runs micro-batches through them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import ClassVar

from drivetrain.contracts import Atom, AxisRequest, Plugin, Sections, hookimpl
from drivetrain_pipeline.section import PATH, PipelineSection


class Pipeline(Plugin):
    """Owns ``pipeline``."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: PipelineSection}

    @hookimpl
    def mesh_axes(self) -> Sequence[AxisRequest]:
        return [Atom("pp", self.section(PipelineSection).stages, f"{PATH}.stages")]

    def features(self) -> Mapping[str, object]:
        section = self.section(PipelineSection)
        return {f"{PATH}.stages": section.stages, f"{PATH}.schedule": section.schedule}
