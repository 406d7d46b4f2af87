"""What a data loader is asked for."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol


class SampleOrder(Protocol):
    """Which samples of a map-style dataset come when, for all shards together.

    It is the same on every rank and depends on neither shards nor workers: the loader deals items
    out, and a position in them means the same whatever their numbers are. An item fills one place
    of a micro-batch: the index of one sample, or of several that share the place.
    """

    def __len__(self) -> int:
        """Items of an epoch."""

    def items(self, epoch: int, start: int) -> Iterator[Sequence[int]]:
        """Items of an epoch, from a position on; does not pass through those before it."""

    def state_dict(self, epoch: int, start: int) -> Any:
        """Plain data, alike on all ranks, from which ``items`` finds a position at once."""

    def load_state_dict(self, state: Any) -> None:
        """Take over what :meth:`state_dict` returned, before ``items`` of that position."""


Finish = Callable[[Any, int, int], Any]
"""Takes a micro-batch, its epoch and the position of its round; returns what the loader yields."""


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
        order: of the items that are dealt out; then neither ``shuffle`` nor ``sampler`` counts.
        finish: changes each micro-batch when it is handed out, in this process.
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
    order: SampleOrder | None = None
    finish: Finish | None = None
