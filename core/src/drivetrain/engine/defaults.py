"""What happens when no plugin takes over: plain data parallelism on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from drivetrain.contracts.plugin.plugin import Plugin, Sections, hookimpl
from drivetrain.sections.data_parallel import DataParallel

if TYPE_CHECKING:
    import torch

    from drivetrain.checkpoint.format.commit import PendingSave
    from drivetrain.contracts.loop.loading import LoaderRequest
    from drivetrain.contracts.loop.runner import Runner
    from drivetrain.contracts.state.bucket import BucketSpec, OptimizerPlan
    from drivetrain.contracts.state.home import StateHome
    from drivetrain.contracts.state.model_states import GradientNorm, ModelStates
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job


class Defaults(Plugin):
    """Core's own answers to the hooks of an engine; asked when no plugin has answered."""

    name = "defaults"
    sections: ClassVar[Sections] = {"data_parallel": DataParallel}

    @hookimpl
    def place_state(self, job: Job, specs: Sequence[BucketSpec]) -> Sequence[StateHome]:
        from drivetrain.states.device_home import DeviceHome

        return [DeviceHome(spec) for spec in specs]

    @hookimpl
    def describe_parameters(self, job: Job, module: torch.nn.Module) -> None:
        from drivetrain.sections.optimization import SparseGradients
        from drivetrain.states.sparse import mark_sparse

        if job.plan.section(SparseGradients).root:
            mark_sparse(module, job.parameters)

    @hookimpl
    def build_model_states(
        self, job: Job, module: torch.nn.Module, optimizer: OptimizerPlan | None
    ) -> ModelStates:
        from drivetrain.states.replicated import ReductionPolicy, ReplicatedStates

        return ReplicatedStates(job, module, optimizer, ReductionPolicy.of(job))

    @hookimpl
    def build_gradient_norm(self, job: Job) -> GradientNorm:
        from drivetrain.states.gradient_norm import SummedNorm

        return SummedNorm(job)

    @hookimpl
    def build_runner(self, job: Job, engine: Engine) -> Runner:
        from drivetrain.engine.micro_batches import MicroBatchRunner

        return MicroBatchRunner(engine)

    @hookimpl
    def build_loader(self, job: Job, request: LoaderRequest) -> Any:
        from drivetrain.engine.loader import default_loader

        return default_loader(request)

    @hookimpl
    def prepare_inputs(
        self, engine: Engine, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        from drivetrain.job.ownership import refuse_orphans

        refuse_orphans(engine.module)
        return engine.precision.cast_inputs(args, kwargs) if engine.precision.inputs else None

    @hookimpl
    def backward(
        self,
        tensors: Sequence[torch.Tensor],
        gradients: Sequence[torch.Tensor | None],
        retain_graph: bool,
    ) -> bool:
        import torch

        torch.autograd.backward(tensors, gradients, retain_graph)
        return True

    @hookimpl
    def optimizer_step(self, engine: Engine) -> bool:
        from drivetrain.engine.stepping import apply_optimizer_step

        return apply_optimizer_step(engine)

    @hookimpl
    def carry_out_save(self, engine: Engine, pending: PendingSave) -> bool:
        from drivetrain.checkpoint.save import write_and_commit

        write_and_commit(engine, pending)
        return True
