"""How samples are dealt out to shards and workers, and what random numbers of workers depend on."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import Any

import torch
from torch.utils.data import IterableDataset, get_worker_info


@dataclass(frozen=True)
class Deal:
    """How a stream of samples is dealt out: each round, every shard gets one micro-batch.

    The order of samples depends on neither shards nor workers, so a position in it (a number of
    samples) means the same whatever their numbers are.
    """

    batch_size: int
    shard: int
    num_shards: int
    drop_last: bool

    @property
    def round_size(self) -> int:
        return self.batch_size * self.num_shards

    @property
    def alone(self) -> Deal:
        """For a stream that holds this shard's samples only."""
        return replace(self, shard=0, num_shards=1)

    def rounds(self, total: int) -> int:
        """Rounds in which ``total`` samples are dealt out."""
        return total // self.round_size if self.drop_last else -(-total // self.round_size)

    def batch(self, samples: Sequence[Any]) -> Sequence[Any] | None:
        """This shard's part of one round; the last may be incomplete.

        Every shard gets as many samples: what is missing is repeated from the round itself.
        """
        size = self.batch_size
        if len(samples) < self.round_size:
            if self.drop_last or not len(samples):
                return None
            size = -(-len(samples) // self.num_shards)
        begin = self.shard * size
        if begin + size <= len(samples):
            return samples[begin : begin + size]
        return [samples[index % len(samples)] for index in range(begin, begin + size)]


class SeededSamples:
    """A map-style dataset that takes (number, indices) of a micro-batch at once.

    Workers draw the random numbers of each micro-batch, also those of ``collate_fn``, from a seed
    of its own. So they depend neither on the workers nor on where a resumed run has begun. Without
    workers they come from the process's generators, which checkpoints save.
    """

    def __init__(self, dataset: Any, place: tuple[int, ...]) -> None:
        self._dataset = dataset
        self._place = place

    def __getitems__(self, batch: tuple[int, Sequence[Any]]) -> Any:
        number, indices = batch
        if get_worker_info() is not None:
            _seed_process("samples", *self._place, number)
        several = getattr(self._dataset, "__getitems__", None)
        return several(indices) if several else [self._dataset[index] for index in indices]

    def __len__(self) -> int:
        return len(self._dataset)


class SeededCollate:
    """Makes (micro-batch, mark) of (number, samples, mark); workers draw from a seed for each."""

    def __init__(self, collate: Callable[[Any], Any], place: tuple[int, ...]) -> None:
        self._collate = collate
        self._place = place

    def __call__(self, batch: tuple[int, Sequence[Any], Any]) -> Any:
        number, samples, mark = batch
        if get_worker_info() is not None:
            _seed_process("collate", *self._place, number)
        return self._collate(samples), mark


class DealtStream(IterableDataset[Any]):
    """This worker's micro-batches of a dataset's stream, as (number, samples, (reader, state)).

    A worker draws random numbers of each round from a seed of its own, also while it reads past
    rounds. Where several read one stream they draw alike, so that a shuffle in it is the same, and
    any of them can go on from the dataset's state after any round, which they know as that of the
    reader "all". A stream that shards itself has a reader for each share.
    """

    def __init__(
        self,
        dataset: Any,
        deal: Deal,
        skip: int,
        place: tuple[int, ...],
        states: Mapping[str, Any],
    ) -> None:
        self._dataset = dataset
        self._deal = deal
        self._skip = skip
        self._place = place
        self._states = states
        names = ("state_dict", "load_state_dict")
        self._stateful = all(hasattr(dataset, name) for name in names)

    def __iter__(self) -> Iterator[tuple[int, Sequence[Any], Any]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        deal = self._deal
        # torch takes micro-batches from workers in turn, from the first; whoever's turn it was at
        # the position is played by the first.
        done, head = divmod(self._skip, deal.round_size)
        role = (worker + done) % workers
        if hasattr(self._dataset, "set_shard"):
            given, share = done // workers + (role < done % workers), deal.shard * workers + role
            self._dataset.set_shard(share, deal.num_shards * workers)
            reader = str(share)
            past = given if self._restored(reader) else 0
            numbers = count(role + past * workers, workers)
            rounds = self._rounds(deal.alone, numbers, self._place)
            chosen = islice(rounds, given - past, None)
        else:
            # Other shards have left a position inside of a round of these.
            reader = "all"
            past, head = (done, 0) if self._restored(reader) else (0, head)
            rounds = self._rounds(deal, count(past), self._place[:-1], head)
            chosen = islice(rounds, done - past + worker, None, workers)
        for number, samples in chosen:
            yield number, samples, (reader, self._dataset.state_dict() if self._stateful else None)

    def _restored(self, reader: str) -> bool:
        """Set the dataset to the state of a reader; False if there is none."""
        if not self._stateful or reader not in self._states:
            return False
        self._dataset.load_state_dict(self._states[reader])
        return True

    def _rounds(
        self, deal: Deal, numbers: Iterable[int], place: tuple[int, ...], head: int = 0
    ) -> Iterator[tuple[int, Sequence[Any]]]:
        shared = not hasattr(self._dataset, "set_shard")
        with _unseen_worker(shared):
            stream = iter(self._dataset)
        for number in numbers:
            if get_worker_info() is not None:
                _seed_process("stream", *place, number)
            with _unseen_worker(shared):
                list(islice(stream, head))
                samples = list(islice(stream, deal.round_size))
            head = 0
            batch = deal.batch(samples)
            if batch is None:
                return
            yield number, batch


@contextmanager
def _unseen_worker(unseen: bool) -> Iterator[None]:
    """Have torch say that this process is no worker, for streams that would shard themselves by it.

    Those of WebDataset and Hugging Face do. The loader would then deal out shares of shares, and
    most samples would never come.
    """
    place: Any = torch.utils.data._utils.worker
    info = place._worker_info
    place._worker_info = None if unseen else info
    try:
        yield
    finally:
        place._worker_info = info


def rounds_of(stream: Iterator[Any], deal: Deal) -> Iterator[Sequence[Any]]:
    """This shard's part of every round of a stream."""
    while (batch := deal.batch(list(islice(stream, deal.round_size)))) is not None:
        yield batch


def generator_of(*place: str | int) -> torch.Generator:
    """A stream of its own for every place."""
    return torch.Generator().manual_seed(_seed(*place))


def _seed_process(*place: str | int) -> None:
    """Have everything that draws without a generator of its own draw from a place's stream."""
    seed = _seed(*place)
    random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if "numpy" in sys.modules:
        sys.modules["numpy"].random.seed(seed)


def _seed(*place: str | int) -> int:
    """A number for every place; torch's generators tell only 32 bits apart, as do NumPy's."""
    return int.from_bytes(hashlib.sha256(repr(place).encode()).digest()[:4], "little")
