"""The plugin that shares sequences out over ranks, and computes parts of models in tiles."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from drivetrain.contracts import (
    Atom,
    AttentionLayer,
    AxisRequest,
    Plugin,
    Problem,
    Sections,
    Transform,
    hookimpl,
)
from drivetrain_sequence.section import (
    PATH,
    SIZE,
    SequenceParallelSection,
    SequenceParallelSize,
)

if TYPE_CHECKING:
    from torch import nn

    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job


class SequenceParallel(Plugin):
    """Owns ``sequence_parallel`` and ``sequence_parallel_size``.

    Where the script has a model-parallel unit of its own, it only sizes the axis.
    """

    name = PATH
    sections: ClassVar[Sections] = {PATH: SequenceParallelSection, SIZE: SequenceParallelSize}

    @hookimpl
    def mesh_axes(self) -> Sequence[AxisRequest]:
        size = self.section(SequenceParallelSize).root
        return [] if size is None else [Atom("sp", size, source=SIZE)]

    @hookimpl
    def configure(self) -> Sequence[Problem]:
        section = self.section(SequenceParallelSection)
        size, ring, chunk = self._size(), section.ring_size, section.chunk
        if size % ring:
            what = f"{ring} ranks cannot be a part of {size} ({SIZE}): give a divisor of it"
            return [Problem(f"{PATH}.ring_size", what)]
        if section.towers == "shared" and ring > 1:
            what = f"towers are shared by ranks that exchange heads: leave out {PATH}.ring_size"
            return [Problem(f"{PATH}.towers", what)]
        if chunk is not None and ring > 1:
            what = f"chunks go with ranks that exchange heads: leave out {PATH}.ring_size"
            return [Problem(f"{PATH}.chunk", what)]
        if chunk is not None and chunk % size:
            what = f"{chunk} tokens are not as many for each of {size} ranks ({SIZE})"
            return [Problem(f"{PATH}.chunk", what)]
        return []

    @hookimpl
    def wrap_attention(self, job: Job) -> Sequence[AttentionLayer]:
        from drivetrain_sequence.wiring import attention_layers

        return attention_layers(job, self.section(SequenceParallelSection))

    @hookimpl
    def transform_module(self, job: Job, module: nn.Module, training: bool) -> Sequence[Transform]:
        from drivetrain_sequence.wiring import transforms

        return transforms(job, self.section(SequenceParallelSection))

    @hookimpl
    def prepare_inputs(
        self, engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        from drivetrain_sequence.wiring import prepared

        return prepared(engine, args, kwargs)

    def features(self) -> Mapping[str, object]:
        section = self.section(SequenceParallelSection)
        tiles = {
            f"{PATH}.{key}": getattr(section, key)
            for key in ("loss_tile", "mlp_tile", "norm_tile", "chunk")
        }
        return {SIZE: self._size(), **tiles}

    def feature_values(self) -> Mapping[str, Sequence[object]]:
        return {SIZE: (1, 2)}

    def _size(self) -> int:
        return self.section(SequenceParallelSize).root or 1
