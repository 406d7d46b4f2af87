"""The plugin that gives each of some ranks a part of every layer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

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
from drivetrain_tensor.section import PATH, TensorParallelSection

if TYPE_CHECKING:
    import torch

    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain.plan.plan import Plan


class TensorParallel(Plugin):
    """Owns ``tensor_parallel``."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: TensorParallelSection}

    def __init__(self, sections: Mapping[str, Any]) -> None:
        super().__init__(sections)
        self._compared: set[int] = set()

    @hookimpl
    def mesh_axes(self) -> Sequence[AxisRequest]:
        ranks = self.section(TensorParallelSection).ranks
        return [Atom("tp", ranks, source=f"{PATH}.autotp_size")] if ranks > 1 else []

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        section = self.section(TensorParallelSection)
        if section.domino and section.sequence_parallel:
            text = "ranks share out sequences in place of the sums that it overlaps: leave out one"
            return [Problem(f"{PATH}.domino", f"not beside sequence_parallel, where {text}")]
        if section.domino and plan.layout.size("pp") > 1:
            text = "stages of a pipeline overlap micro-batches instead: leave out one of the two"
            return [Problem(f"{PATH}.domino", text)]
        return []

    @hookimpl
    def transform_module(self, job: Job, module: torch.nn.Module) -> Sequence[Transform]:
        from drivetrain_tensor.work import Work

        work = Work(job, self.section(TensorParallelSection), module)
        if job.mesh.size("tp") == 1:
            return []
        # Stages come after the cut; from then on no rank can run the whole model.
        compared = Phase.RECOMPUTE if job.mesh.size("pp") == 1 else Phase.PARTITION
        return [Transform(Phase.PARTITION, work.cut), Transform(compared, work.compare)]

    @hookimpl
    def describe_parameters(self, job: Job, module: torch.nn.Module) -> None:
        from drivetrain_tensor.megatron import describe

        if job.mesh.size("tp") > 1:
            describe(job, module)

    @hookimpl
    def prepare_inputs(self, engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        from drivetrain_tensor.work import check_inputs

        if id(engine) not in self._compared:
            self._compared.add(id(engine))
            check_inputs(engine.job, args, kwargs)

    def features(self) -> Mapping[str, object]:
        section = self.section(TensorParallelSection)
        return {
            f"{PATH}.autotp_size": section.ranks,
            f"{PATH}.tp_overlap_comm": section.tp_overlap_comm,
            f"{PATH}.vocabulary": section.vocabulary,
            f"{PATH}.sequence_parallel": section.sequence_parallel,
            f"{PATH}.domino": section.domino,
        }

    def feature_values(self) -> Mapping[str, Sequence[object]]:
        return {f"{PATH}.autotp_size": (1, 2)}
