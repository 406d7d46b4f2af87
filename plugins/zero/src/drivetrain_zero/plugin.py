"""The plugin: builds sharded model states from the section ``zero_optimization``."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from drivetrain.contracts import Plugin, Problem, Sections, hookimpl
from drivetrain_zero.section import ZeroSection

if TYPE_CHECKING:
    from torch import nn

    from drivetrain.contracts import AxisRequest, CommunicatorLayer, ModelStates, OptimizerPlan
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain.plan.plan import Plan

PATH = "zero_optimization"

SHARD_AXIS = "zero_shard"
REPLICA_AXIS = "zero_replica"
SECONDARY_AXIS = "zero_secondary"
_SECONDARY_COPIES = "zero_secondary_copies"


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
            f"{PATH}.overlap_param_gather": self.config.overlap_param_gather,
            f"{PATH}.mics_shard_size": self.config.mics_shard_size,
            f"{PATH}.zero_hpz_partition_size": self.config.zero_hpz_partition_size,
            f"{PATH}.zero_quantized_weights": self.config.zero_quantized_weights,
            f"{PATH}.zero_quantized_gradients": self.config.zero_quantized_gradients,
        }

    def feature_values(self) -> Mapping[str, Sequence[object]]:
        return {
            f"{PATH}.stage": (0, 1, 2, 3),
            f"{PATH}.gradient_reduction": (None, "micro_batch", "boundary"),
            f"{PATH}.overlap_param_gather": (False, True),
        }

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        size, ranks = self.config.zero_ranks_per_node or 1, plan.world_size
        if ranks % size:
            flaw = f"is {size}, which does not divide the {ranks} ranks"
            return [Problem(f"{PATH}.zero_ranks_per_node", flaw)]
        return []

    @hookimpl
    def mesh_axes(self, plan: Plan) -> Sequence[AxisRequest]:
        from drivetrain.contracts import SplitAxis

        config, splits = self.config, []
        if config.mics_shard_size > 0:
            path = f"{PATH}.mics_shard_size"
            size = config.mics_shard_size
            splits.append(SplitAxis(SHARD_AXIS, size, complement=REPLICA_AXIS, source=path))
        if config.zero_hpz_partition_size > 1:
            path = f"{PATH}.zero_hpz_partition_size"
            size = config.zero_hpz_partition_size
            splits.append(
                SplitAxis(SECONDARY_AXIS, size, complement=_SECONDARY_COPIES, source=path)
            )
        return splits

    @hookimpl
    def wrap_communicator(self, job: Job) -> Sequence[CommunicatorLayer]:
        config = self.config
        quantised = (
            config.zero_quantized_weights,
            config.zero_quantized_nontrainable_weights,
            config.zero_quantized_gradients,
        )
        if not any(quantised):
            return ()
        from drivetrain_zero.compressed.layers import layers_of

        return layers_of(job, config)

    @hookimpl
    def keep_parameters(self, job: Job, module: nn.Module) -> None:
        if self.config.stage == 3:
            from drivetrain_zero.init.shards import keep_in_shards

            keep_in_shards(job, module)

    @hookimpl
    def build_model_states(
        self, job: Job, module: nn.Module, optimizer: OptimizerPlan | None
    ) -> ModelStates:
        from drivetrain_zero.policy import policy_of
        from drivetrain_zero.scripts.leaves import mark_configured
        from drivetrain_zero.states import ZeroStates

        if self.config.stage == 3:
            mark_configured(module, self.config.leaf_module)
        return ZeroStates(job, module, optimizer, policy_of(job, self.config))

    @hookimpl
    def memory_rows(self, engine: Engine) -> Sequence[tuple[str, str, int, int]]:
        from drivetrain_zero.states import ZeroStates

        return engine.states.memory_rows() if isinstance(engine.states, ZeroStates) else ()
