"""What a data loader is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, Literal


@dataclass(frozen=True)
class LoaderRequest:
    """A data loader that someone wants.

    Args:
        dataset: map-style (``__len__`` and ``__getitem__``) or a torch ``IterableDataset``.
        batch_size: samples per micro-batch of one shard.
        route: what the data is for.
        shuffle: reorder a map-style dataset every epoch; ``None`` does so for training only.
        collate_fn: makes a micro-batch of a list of samples; torch's default if ``None``.
        sampler: indices of this shard's samples, instead of the loader's own order.
        num_workers: processes that load; 0 loads in this one.
        pin_memory: page-locked batches, where there is an accelerator.
        drop_last: drop samples that fill no micro-batch on every shard, instead of repeating some.
        shard: index of this data shard.
        num_shards: number of data shards.
        seed: decides the order, together with the epoch.
    """

    dataset: Any
    batch_size: int
    route: Literal["train", "eval", "predict"] = "train"
    shuffle: bool | None = None
    collate_fn: Callable[[list[Any]], Any] | None = None
    sampler: Iterable[int] | None = None
    num_workers: int = 0
    pin_memory: bool = True
    drop_last: bool = False
    shard: int = 0
    num_shards: int = 1
    seed: int = 0
