"""What happens when no plugin takes over: plain data parallelism on the device."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import Field

from drivetrain.plugin import Plugin, Section, Sections, hookimpl
from drivetrain.section import Bool, PositiveInt

if TYPE_CHECKING:
    import torch

    from drivetrain.checkpoint import PendingSave
    from drivetrain.engine import Engine
    from drivetrain.home import BucketSpec, StateHome
    from drivetrain.job import Job
    from drivetrain.loader import LoaderRequest
    from drivetrain.model_states import ModelStates
    from drivetrain.runner import Runner
    from drivetrain.update_rule import OptimizerPlan

_MIB = 1024 * 1024


class DataParallel(Section):
    """Reduction of replicated gradients."""

    bucket_bytes: PositiveInt = Field(
        default=25 * _MIB, description="Gradients reduced by one call, in bytes (25 MiB)."
    )
    first_bucket_bytes: PositiveInt = Field(
        default=_MIB,
        description="The bucket that backward fills first, in bytes (1 MiB); a small one lets "
        "communication start early.",
    )
    overlap: Bool = Field(default=True, description="Reduce while backward goes on.")


class Defaults(Plugin):
    """Core's own answers to the hooks of an engine; asked when no plugin has answered."""

    name = "defaults"
    sections: ClassVar[Sections] = {"data_parallel": DataParallel}

    @hookimpl
    def place_state(self, job: Job, specs: Sequence[BucketSpec]) -> Sequence[StateHome]:
        from drivetrain.home import DeviceHome

        return [DeviceHome(spec) for spec in specs]

    @hookimpl
    def describe_parameters(self, job: Job, module: torch.nn.Module) -> None:
        from drivetrain.builtin.optimization import SparseGradients
        from drivetrain.replicated.sparse import mark_sparse

        if job.plan.section(SparseGradients).root:
            mark_sparse(module, job.parameters)

    @hookimpl
    def build_model_states(
        self, job: Job, module: torch.nn.Module, optimizer: OptimizerPlan | None
    ) -> ModelStates:
        from drivetrain.replicated import ReductionPolicy, ReplicatedStates

        return ReplicatedStates(job, module, optimizer, ReductionPolicy.of(job))

    @hookimpl
    def build_runner(self, job: Job, engine: Engine) -> Runner:
        from drivetrain.runner import MicroBatchRunner

        return MicroBatchRunner(engine)

    @hookimpl
    def build_loader(self, job: Job, request: LoaderRequest) -> Any:
        from drivetrain.loader import DataLoader

        return DataLoader(request)

    @hookimpl
    def backward(self, engine: Engine, loss: torch.Tensor, retain_graph: bool) -> bool:
        loss.backward(retain_graph=retain_graph)  # type: ignore[no-untyped-call]
        return True

    @hookimpl
    def optimizer_step(self, engine: Engine) -> bool:
        from drivetrain.stepping import apply_optimizer_step

        return apply_optimizer_step(engine)

    @hookimpl
    def carry_out_save(self, engine: Engine, pending: PendingSave) -> bool:
        from drivetrain.checkpoint.save import write_and_commit

        write_and_commit(engine, pending)
        return True
