"""The batch triple: global batch = micro-batch x accumulation steps x data shards."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Batch:
    """How many samples each part of a step sees.

    Args:
        train_batch_size: samples of one optimizer step over all ranks.
        micro_batch_size: samples of one forward on one data shard.
        accumulation_steps: micro-batches between two optimizer steps.
        data_shards: data-parallel size, by which the global batch is split.
    """

    train_batch_size: int
    micro_batch_size: int
    accumulation_steps: int
    data_shards: int
