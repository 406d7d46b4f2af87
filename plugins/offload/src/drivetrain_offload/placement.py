"""Which home each bucket gets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING

from drivetrain.contracts import BucketSpec, StateHome
from drivetrain.errors import ConfigError
from drivetrain.states.device_home import DeviceHome
from drivetrain_offload.homes.bucket import HostBucket
from drivetrain_offload.homes.delayed import Delayed
from drivetrain_offload.homes.host import HostHome
from drivetrain_offload.homes.speculative import Speculative
from drivetrain_offload.homes.split import SplitHome, cuts, part_of
from drivetrain_offload.homes.timing import InLine, OnWorker, Timing
from drivetrain_offload.homes.zenflow import ByImportance
from drivetrain_offload.host.copies import Lanes
from drivetrain_offload.host.memory import is_host, is_planned, refuse_too_little
from drivetrain_offload.host.side import HostSide
from drivetrain_offload.memory import MemoryRow, note_memory
from drivetrain_offload.specs import (
    PATH,
    keeps_of_bucket,
    refuse_communicating,
    state_bytes,
)

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_offload.section import Aio, OffloadOptimizer, OffloadParam
    from drivetrain_offload.zenflow_section import ZenFlow

    Factory = Callable[[Sequence[BucketSpec]], list[StateHome]]

logger = logging.getLogger("drivetrain.offload")


def homes_of(
    job: Job,
    specs: Sequence[BucketSpec],
    optimizer: OffloadOptimizer,
    param: OffloadParam,
    aio: Aio,
    zenflow: ZenFlow | None = None,
) -> list[StateHome]:
    """A home for every bucket, in the order of ``specs``.

    Raises:
        ConfigError: the host has too little memory, or an update rule cannot work on it.
    """
    homes = _state_homes(job, specs, optimizer, aio, zenflow)
    if param.device == "none":
        return homes
    from drivetrain_offload.parameters.kept import keep

    return keep(job, specs, homes, param, aio)


def _state_homes(
    job: Job,
    specs: Sequence[BucketSpec],
    section: OffloadOptimizer,
    aio: Aio,
    zenflow: ZenFlow | None,
) -> list[StateHome]:
    """Homes of masters and optimizer states."""
    if section.device == "none":
        return [DeviceHome(spec) for spec in specs]
    make: Factory = partial(host_homes, job, section, zenflow=zenflow)
    if section.device == "nvme":
        from drivetrain_offload.files.home import nvme_homes

        make = partial(nvme_homes, job, section=section, aio=aio)
    return divided_homes(specs, section.ratio, make)


def divided_homes(specs: Sequence[BucketSpec], ratio: float, make: Factory) -> list[StateHome]:
    """A home for every bucket, of which all or a part is kept off the device.

    Args:
        specs: all buckets.
        ratio: share of the elements of trained ones that is offloaded.
        make: makes homes for that share.
    """
    kept = cuts(specs, ratio)
    offloaded = [
        part_of(spec, cut, spec.numel)
        for spec, cut in zip(specs, kept, strict=True)
        if spec.rule is not None and cut < spec.numel
    ]
    made = iter(make(offloaded))
    homes: list[StateHome] = []
    for spec, cut in zip(specs, kept, strict=True):
        if spec.rule is None or cut == spec.numel:
            homes.append(DeviceHome(spec))
        elif cut == 0:
            homes.append(next(made))
        else:
            homes.append(SplitHome(spec, DeviceHome(part_of(spec, 0, cut)), next(made)))
    return homes


def host_homes(
    job: Job,
    section: OffloadOptimizer,
    specs: Sequence[BucketSpec],
    *,
    zenflow: ZenFlow | None = None,
) -> list[StateHome]:
    """Homes in host memory.

    Raises:
        ConfigError: the host has too little memory, or an update rule communicates.
    """
    side = HostSide.of(job, section)
    way = way_of(job, section, specs, zenflow)
    states, buffers = sum(map(state_bytes, specs)), way.buffer_bytes
    if not is_planned(job):
        refuse_too_little(
            states + buffers,
            job.ranks.ranks_on_host,
            what=f"{PATH}: device cpu needs {states:,} bytes of masters and optimizer states"
            + (f" and {buffers:,} of buffers" if buffers else ""),
        )
    if is_planned(job) and zenflow is not None:
        columns = sum(ByImportance.device_bytes(spec, zenflow) for spec in specs)
        note_memory(job, lambda: [MemoryRow("important columns", "device", columns)])
    side.reserve(*way.lane_bytes, way.extra_bytes - way.shown_bytes)
    logger.info(
        "rank %d keeps %s bytes of masters and optimizer states in host memory, and %s of buffers",
        *(job.rank, f"{states:,}", f"{buffers:,}"),
    )
    return [HostHome(spec, side, way.timing) for spec in specs]


@dataclass(frozen=True)
class Way:
    """How buckets are updated on the host.

    Args:
        timing: says when each of them is, and by whom.
        through_lanes: buckets that come down and go up through the shared lanes.
        extra_bytes: of host memory beside masters, states and lanes.
        shown_bytes: how many of these the homes' fragments show.
    """

    timing: Callable[[HostBucket], Timing]
    through_lanes: Sequence[BucketSpec] = ()
    extra_bytes: int = 0
    shown_bytes: int = 0

    @property
    def lane_bytes(self) -> tuple[int, int]:
        """Bytes of a gradient and of parameters in each lane."""
        lanes = self.through_lanes
        gradient = max((s.numel * s.gradient_dtype.itemsize for s in lanes), default=0)
        return gradient, max((s.numel * s.parameter_dtype.itemsize for s in lanes), default=0)

    @property
    def buffer_bytes(self) -> int:
        """Bytes of host memory beside masters and states."""
        return self.extra_bytes + Lanes.COUNT * sum(self.lane_bytes)


def way_of(
    job: Job, section: OffloadOptimizer, specs: Sequence[BucketSpec], zenflow: ZenFlow | None
) -> Way:
    """How a config wants buckets updated.

    Raises:
        ConfigError: their update rule, or their dtypes, do not allow it.
    """
    delayed = sum(map(Delayed.extra_bytes, specs))
    if zenflow is not None:
        refuse_communicating(specs)
        _refuse_without_masters(specs, "zero_optimization.zenflow")
        _refuse_whole_tensors(specs)
        extra = sum(map(ByImportance.extra_bytes, specs))
        timing = partial(ByImportance, section=zenflow)
        return Way(timing, extra_bytes=extra, shown_bytes=extra - delayed)
    if section.delayed_update:
        refuse_communicating(specs)
        _refuse_without_masters(specs, f"{PATH}.delayed_update")
        return Way(Delayed, extra_bytes=delayed)
    if section.super_offload:
        refuse_communicating(specs)
        ahead = [spec for spec in specs if spec.has_masters]
        extra = sum(Speculative.extra_bytes(spec, state_bytes(spec)) for spec in ahead)
        lanes = [spec for spec in specs if spec.has_masters or not is_host(job)]
        return Way(_speculative, lanes, extra)
    on_device = [] if is_host(job) else specs
    refuse_communicating(on_device)
    return Way(_at_once, on_device)


def _at_once(bucket: HostBucket) -> Timing:
    return (InLine if bucket.side.is_near(bucket.spec.device) else OnWorker)(bucket)


def _speculative(bucket: HostBucket) -> Timing:
    """Guess ahead of masters only: parameters may be changed by clients until the update."""
    return Speculative(bucket) if bucket.spec.has_masters else _at_once(bucket)


def _refuse_without_masters(specs: Sequence[BucketSpec], path: str) -> None:
    for spec in specs:
        if not spec.has_masters:
            raise ConfigError(
                f"{path}: parameters in {spec.parameter_dtype} are their own masters here, so that "
                "nothing can be ahead of them; use bf16 or fp16 with float32 masters"
            )


def _refuse_whole_tensors(specs: Sequence[BucketSpec]) -> None:
    for spec in specs:
        assert spec.rule is not None, f"bucket {spec.key} is not trained"
        if spec.rule.grain != "element" or keeps_of_bucket(spec):
            raise ConfigError(
                f"zero_optimization.zenflow: the optimizer {type(spec.rule).__name__} does not "
                "work element by element, so columns cannot be updated by themselves; use AdamW, "
                "for example"
            )
