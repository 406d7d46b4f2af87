"""The batch triple and who decides where an accumulation ends."""

from __future__ import annotations

from typing import TYPE_CHECKING, ClassVar

from pydantic import Field

from drivetrain.contracts.loop.batch import ACCUMULATION, GLOBAL, MICRO, Batch, solve_batch
from drivetrain.contracts.plugin.plugin import Plugin, Sections, hookimpl
from drivetrain.contracts.plugin.section import Bool, PositiveInt, Scalar
from drivetrain.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping

    from drivetrain.plan.plan import Plan


class TrainBatchSize(Scalar[PositiveInt | None]):
    """Samples of one optimizer step over all ranks; by default micro-batch x steps x shards."""

    root: PositiveInt | None = None


class MicroBatchSize(Scalar[PositiveInt | None]):
    """Samples of one forward on one data shard; by default derived from the global batch."""

    root: PositiveInt | None = None


class AccumulationSteps(Scalar[PositiveInt | None]):
    """Micro-batches between two optimizer steps; by default derived, or 1."""

    root: PositiveInt | None = None


class ManagedAccumulation(Scalar[Bool]):
    """Whether the engine counts micro-batches (default true); if not, every ``step()`` updates."""

    root: Bool = Field(default=True)


class BatchPlan(Plugin):
    """Solves the batch triple from what the config gives."""

    name = "batch"
    sections: ClassVar[Sections] = {
        GLOBAL: TrainBatchSize,
        MICRO: MicroBatchSize,
        ACCUMULATION: AccumulationSteps,
        "managed_gradient_accumulation": ManagedAccumulation,
    }

    @hookimpl
    def plan_batch(self, plan: Plan) -> Batch | None:
        train = self.section(TrainBatchSize).root
        micro = self.section(MicroBatchSize).root
        if train is None and micro is None and not plan.batch_required:
            return None
        unset = [path for path in (GLOBAL, MICRO) if path in plan.autos]
        if train is None and micro is None and unset:
            raise ConfigError(
                f"one of {GLOBAL} and {MICRO} is required, but there is only "
                f'"auto" for {" and ".join(unset)}, which counts as unset until a framework '
                "fills it in; give a number"
            )
        return solve_batch(
            train,
            micro,
            self.section(AccumulationSteps).root,
            plan.layout.size("dp"),
            plan.shards_origin(),
        )

    def features(self) -> Mapping[str, object]:
        return {
            ACCUMULATION: self.section(AccumulationSteps).root or 1,
            "managed_gradient_accumulation": self.section(ManagedAccumulation).root,
        }

    def feature_values(self) -> Mapping[str, tuple[object, ...]]:
        return {ACCUMULATION: (1, 3), "managed_gradient_accumulation": (True, False)}
