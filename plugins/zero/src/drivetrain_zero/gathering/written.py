"""Shows what was written to shards, to the ranks that share them and to no others."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from drivetrain.contracts import Purpose, Tag
from drivetrain_zero.gathering.unit import Reason

if TYPE_CHECKING:
    from drivetrain.contracts import Communicator
    from drivetrain_zero.gathering.unit import GatheredUnit
    from drivetrain_zero.shards.bucket import ShardedBucket


def begin_publish(bucket: ShardedBucket) -> None:
    """Begin to show an updated shard to every rank."""
    bucket.home.publish()
    bucket.whole.publish()


def show_written(
    buckets: Sequence[ShardedBucket], units: Sequence[GatheredUnit], communicator: Communicator
) -> None:
    """Let ranks compute with shards that were written.

    Collective over the ranks that share ``buckets`` alone: another stage of a pipeline, which has
    none of these parameters, does not take part in writing them.

    Args:
        buckets: that were written to, in an order that these ranks have in common.
        units: of the model that are gathered; empty where parameters are always whole.
        communicator: of the job.
    """
    for bucket in buckets:
        bucket.shown.forget_values()
        bucket.whole.shard_changes()
        begin_publish(bucket)
    for bucket in buckets:
        bucket.whole.finish_publish()
        # Ranks that share memory read each other's shards in place, so all have to be written.
        communicator.barrier(bucket.axis, Tag(Purpose.CONTROL, bucket.key, "written"))
    for unit in units:
        if any(bucket in unit.buckets for bucket in buckets):
            unit.let_go(Reason.UPDATE, Reason.HELD)
            unit.renew()
    for bucket in buckets:
        bucket.shown.note_values()
