"""Carrying states over from one layout of shards to another."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import Purpose, Tag

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_zero.shards.bucket import ShardedBucket

Whole = dict[tuple[str, str], torch.Tensor]
"""(parameter name, kind) -> the parameter's whole state, flat, on the host."""


def collect_states(job: Job, buckets: Iterable[ShardedBucket]) -> Whole:
    """Every master and optimizer state of ``buckets``, whole on each rank. Collective."""
    found: Whole = {}
    for bucket in buckets:
        bucket.home.flush()
        names = [segment.name for segment in bucket.plan.spec.segments]
        fragments = {
            (fragment.name, fragment.kind): fragment
            for fragment in bucket.home.fragments()
            if fragment.on_reshape == "redistribute"
        }
        for kind, dtype in bucket.state_kinds().items():
            mine = torch.zeros(bucket.packing.shard, dtype=dtype, device=bucket.spec.device)
            for segment in bucket.spec.segments:
                if (segment.name, kind) in fragments:
                    part = mine.narrow(0, segment.offset, segment.numel)
                    part.copy_(fragments[segment.name, kind].read())
            whole = torch.zeros(bucket.packing.numel, dtype=dtype, device=bucket.spec.device)
            tag = Tag(Purpose.STATE, f"{bucket.key}/{kind}", "new layout")
            job.communicator.all_gather(whole, mine, bucket.axis, tag)
            for name, view in zip(names, bucket.views_of(whole), strict=True):
                found[name, kind] = view.reshape(-1).cpu()
    return found


def restore_states(
    buckets: Iterable[ShardedBucket], kept: Mapping[tuple[str, str], torch.Tensor]
) -> None:
    """Write what is known of each state into the shards of a new layout."""
    for bucket in buckets:
        starts = {segment.name: segment for segment in bucket.spec.segments}
        for fragment in bucket.home.fragments():
            whole = kept.get((fragment.name, fragment.kind))
            if whole is not None and fragment.on_reshape == "redistribute":
                segment = starts[fragment.name]
                fragment.write(whole.narrow(0, segment.start, segment.numel))
