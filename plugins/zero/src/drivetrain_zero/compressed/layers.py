"""The communicator's decorators for one job's ``zero_optimization`` (ZeRO++)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import (
    Communicator,
    CommunicatorLayer,
    CommunicatorPhase,
    CommunicatorWrapper,
    Purpose,
    Tag,
)
from drivetrain_zero.compressed.error_feedback import ErrorFeedback
from drivetrain_zero.compressed.quantized_gradients import QuantizedReduce
from drivetrain_zero.compressed.quantized_weights import QuantizedGather
from drivetrain_zero.plugin import SECONDARY_AXIS
from drivetrain_zero.shards.frozen import is_frozen

if TYPE_CHECKING:
    from drivetrain.contracts import Fragment
    from drivetrain.job.job import Job
    from drivetrain_zero.section import ZeroSection
    from drivetrain_zero.shards.bucket import ShardedBucket


def layers_of(job: Job, section: ZeroSection) -> list[CommunicatorLayer]:
    """What ``section`` asks to be quantised. Collective where gradients are."""
    wrappers: list[Callable[[Communicator], Communicator]] = []
    rounds = rounded_keys(section)
    if rounds is not None:
        exact = SECONDARY_AXIS if section.zero_hpz_partition_size > 1 else None
        wrappers.append(lambda inner: QuantizedGather(inner, rounds, exact))
    if section.zero_quantized_gradients:
        nodes = _nodes(job, section.zero_ranks_per_node)
        loco, progress = section.zeropp_loco_param, job.progress
        feedback = None
        if loco is not None:
            feedback = ErrorFeedback(loco.err_beta, loco.reset_T, lambda: progress.steps)
        wrappers.append(lambda inner: QuantizedReduce(inner, job.mesh, nodes, feedback))
    return [CommunicatorLayer(CommunicatorPhase.COMPRESS, wrap) for wrap in wrappers]


def rounded_keys(section: ZeroSection) -> Callable[[str], bool] | None:
    """Tells of a bucket's key whether its parameters are rounded when gathered (qwZ)."""
    if section.zero_quantized_weights:
        return lambda _key: True
    return is_frozen if section.zero_quantized_nontrainable_weights else None


def kept_errors(communicator: Communicator, trained: Iterable[ShardedBucket]) -> list[Fragment]:
    """Make room for the quantisation errors of gradients, if they are fed back (LoCo).

    Returns:
        The errors as parts of a checkpoint.
    """
    while isinstance(communicator, CommunicatorWrapper):
        if isinstance(communicator, QuantizedReduce):
            kept = [
                communicator.reserve(b.key, b.axis, b.packing.shard, b.spec.device) for b in trained
            ]
            return [fragment for fragment in kept if fragment is not None]
        communicator = communicator.inner
    return []


def _nodes(job: Job, ranks_per_node: int | None) -> list[int]:
    """The node of every rank, by the number of its first rank."""
    if ranks_per_node is not None:
        return [rank // ranks_per_node for rank in range(job.world_size)]
    firsts = torch.zeros(job.world_size, dtype=torch.int64, device=job.device)
    firsts[job.rank] = job.rank - job.ranks.local_rank
    job.communicator.all_reduce(firsts, "world", Tag(Purpose.CONTROL, site="nodes"))
    return [int(first) for first in firsts]
