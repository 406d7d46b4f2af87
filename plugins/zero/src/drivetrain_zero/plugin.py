"""The plugin: builds sharded model states from the section ``zero_optimization``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from drivetrain.plugin import Plugin, Problem, Sections, hookimpl
from drivetrain_zero.section import ZeroSection

if TYPE_CHECKING:
    from torch import nn

    from drivetrain.job import Job
    from drivetrain.mesh_layout import AxisRequest
    from drivetrain.model_states import ModelStates
    from drivetrain.plan import Plan
    from drivetrain.update_rule import OptimizerPlan

PATH = "zero_optimization"

SHARD_AXIS = "zero_shard"
REPLICA_AXIS = "zero_replica"


class Zero(Plugin):
    """Owns ``zero_optimization``; active from stage 1 on."""

    name = PATH
    sections: ClassVar[Sections] = {PATH: ZeroSection}

    @property
    def config(self) -> ZeroSection:
        """The section."""
        return self.section(ZeroSection)

    def enabled(self) -> bool:
        return self.config.stage > 0

    def features(self) -> Mapping[str, object]:
        return {
            f"{PATH}.stage": self.config.stage,
            f"{PATH}.gradient_reduction": self.config.gradient_reduction,
            f"{PATH}.mics_shard_size": self.config.mics_shard_size,
        }

    def feature_values(self) -> Mapping[str, Sequence[object]]:
        return {
            f"{PATH}.stage": (1, 2, 3),
            f"{PATH}.gradient_reduction": (None, "micro_batch", "boundary"),
        }

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        size, shards = self.config.mics_shard_size, plan.layout.size("data")
        if size > 0 and shards % size:
            return [
                Problem(
                    f"{PATH}.mics_shard_size",
                    f"is {size}, which does not divide the {shards} data-parallel ranks",
                )
            ]
        return []

    @hookimpl
    def mesh_axes(self, plan: Plan) -> Sequence[AxisRequest]:
        from drivetrain.mesh_layout import SplitAxis

        size = self.config.mics_shard_size
        if size <= 0:
            return ()
        path = f"{PATH}.mics_shard_size"
        return [SplitAxis(SHARD_AXIS, size, complement=REPLICA_AXIS, source=path)]

    @hookimpl
    def build_model_states(
        self, job: Job, module: nn.Module, optimizer: OptimizerPlan | None
    ) -> ModelStates:
        from drivetrain_zero.policy import policy_of
        from drivetrain_zero.states import ZeroStates

        return ZeroStates(job, module, optimizer, policy_of(job, self.config))
