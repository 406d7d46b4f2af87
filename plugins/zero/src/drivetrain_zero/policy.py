"""What ``zero_optimization`` means for one job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from drivetrain.states.buckets import BucketSizes
from drivetrain.states.replicated import ReductionPolicy
from drivetrain_zero.compressed.layers import rounded_keys
from drivetrain_zero.gathering.gatherer import GatherPolicy
from drivetrain_zero.plugin import REPLICA_AXIS, SECONDARY_AXIS, SHARD_AXIS

if TYPE_CHECKING:
    from collections.abc import Callable

    import torch

    from drivetrain.contracts import Axis
    from drivetrain.job.job import Job
    from drivetrain_zero.section import ZeroSection


@dataclass(frozen=True)
class ZeroPolicy:
    """What is sharded, and how gradients accumulate and travel.

    Args:
        by_unit: parameters are gathered unit by unit, around their use.
        frozen: so are those that are not trained (stage 3).
        every_backward: reduce and shard gradients after each micro-batch.
        sizes: bucket limits at stages 1 and 2.
        gradient_dtype: accumulation dtype; ``None`` for each parameter's own.
        overlap: communicate while the device computes.
        predivide: factor that gradients are divided by before they are summed.
        gather: when parameters are gathered, where that is by unit.
        replica_axis: axis over which shards of ``"data"`` are copies (MiCS); ``None`` for none.
        shard_axis: axis that states reduced over ``"data"`` are sharded over.
        secondary_axis: axis that parameters reduced over ``"data"`` are sharded over a second
            time (hpZ); ``None`` for no such shards.
        rounds: tells of a bucket's key whether gathers round its parameters (qwZ); ``None`` for
            no bucket.
        need_all_gradients: a parameter without gradient in a window is an error.
        sanity_checks: find parameters that were changed behind the states' back.
    """

    by_unit: bool
    frozen: bool
    every_backward: bool
    sizes: BucketSizes
    gradient_dtype: torch.dtype | None
    overlap: bool
    predivide: float
    gather: GatherPolicy
    shard_axis: Axis = "data"
    replica_axis: Axis | None = None
    secondary_axis: Axis | None = None
    rounds: Callable[[str], bool] | None = None
    need_all_gradients: bool = False
    sanity_checks: bool = False

    def axes(self, reduction: Axis) -> tuple[Axis, Axis | None]:
        """The axis to shard over and the one to replicate over, of a reduction."""
        return (self.shard_axis, self.replica_axis) if reduction == "data" else (reduction, None)


def policy_of(job: Job, section: ZeroSection) -> ZeroPolicy:
    """The policy of a job, from its whole config."""
    replicated = ReductionPolicy.of(job)
    overlap = section.overlap_comm
    if overlap is None:
        overlap = job.device.type != "cpu"
    mics = section.mics_shard_size > 0
    sizes = replicated.sizes
    if section.reduce_bucket_size is not None:
        width = replicated.gradient_dtype.itemsize if replicated.gradient_dtype else 4
        limit = section.reduce_bucket_size * width
        sizes = BucketSizes(regular=limit, first=min(sizes.first, limit))
    return ZeroPolicy(
        by_unit=section.stage == 3 or section.overlap_param_gather,
        frozen=section.stage == 3,
        every_backward=section.shards_gradients,
        sizes=sizes,
        gradient_dtype=replicated.gradient_dtype,
        overlap=overlap,
        predivide=replicated.predivide,
        gather=GatherPolicy(
            ahead=section.stage3_prefetch_bucket_size,
            live=section.stage3_max_live_parameters,
            persistent=section.stage3_param_persistence_threshold if section.stage == 3 else 0,
            persistent_total=section.stage3_model_persistence_threshold,
            reuse_distance=section.stage3_max_reuse_distance,
            until_update=section.overlap_param_gather and section.stage < 3,
            log_order=section.log_trace_cache_warnings,
        ),
        shard_axis=SHARD_AXIS if mics else "data",
        replica_axis=REPLICA_AXIS if mics else None,
        secondary_axis=SECONDARY_AXIS if section.zero_hpz_partition_size > 1 else None,
        rounds=rounded_keys(section),
        need_all_gradients=not section.ignore_unused_parameters,
        sanity_checks=section.enable_sanity_checks,
    )
