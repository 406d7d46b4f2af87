"""The data loader: sharded, reshuffled every epoch, and resumable at every position."""

from __future__ import annotations

import hashlib
import random
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count, islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import IterableDataset, get_worker_info

from drivetrain.contracts.loop.loading import LoaderRequest
from drivetrain.errors import CheckpointError, ConfigError, TrainingError
from drivetrain.sections.data import DataloaderDropLast, Seed

if TYPE_CHECKING:
    from drivetrain.contracts.loop.batch import Batch
    from drivetrain.job.job import Job


@dataclass(frozen=True)
class _Deal:
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
    def alone(self) -> _Deal:
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


class DataLoader:
    """Yields this shard's micro-batches, one epoch per pass.

    Every pass over the loader is a new epoch with a new order, the same on all ranks and different
    from epoch to epoch. A pass that was left early is not continued, except after
    :meth:`load_state_dict`, which also ends a pass that is under way.

    Map-style datasets are dealt out exactly once per epoch (the last round aside, see
    ``drop_last``). Of an ``IterableDataset`` every worker of every shard reads the whole stream and
    keeps its own micro-batches; a dataset that does better has a method
    ``set_shard(index, count)``, called in each worker before each pass, and then yields only that
    share, as many samples on every shard. Samplers and datasets with ``set_epoch(epoch)`` are told
    the epoch. A position is resumed without loading what comes before it, but an
    ``IterableDataset`` has to be read past it, unless it has ``state_dict`` and ``load_state_dict``
    and is loaded without workers.

    Workers draw random numbers (``torch``, ``random``, NumPy) from a seed for each micro-batch, so
    that they are the same after a resume, and do not repeat. Generators of a dataset's own are its
    own business. Of a stream that every worker reads whole, all draw alike.

    Args:
        request: what to load.

    Raises:
        ConfigError: not a dataset, an empty one, or sizes that make no micro-batch.
    """

    def __init__(self, request: LoaderRequest) -> None:
        _check(request)
        self.dataset = request.dataset
        self.batch_size = request.batch_size
        self.epoch = 0
        self._request = request
        self._deal = _Deal(request.batch_size, request.shard, request.num_shards, request.drop_last)
        self._iterable = isinstance(request.dataset, IterableDataset)
        self._consumed = 0  # samples of this epoch handed out on all shards together
        self._left_early = False
        self._resets = 0
        self._dataset_state: Any = None

    def __len__(self) -> int:
        """Micro-batches of a whole epoch; ``TypeError`` if the dataset has no length."""
        if self._request.sampler is not None:
            sized: Any = self._request.sampler
            return self._deal.alone.rounds(len(sized))
        return self._deal.rounds(len(self._dealt))

    def __iter__(self) -> Iterator[Any]:
        if self._left_early:
            self._start_epoch(self.epoch + 1)
        resets, resumed = self._resets, self._consumed > 0
        for batch in self._batches():
            if self._request.finish is not None:
                batch = self._request.finish(batch, self.epoch, self._consumed)
            self._consumed += self._deal.round_size
            self._left_early = not self._epoch_is_over()
            if not self._left_early:
                self._start_epoch(self.epoch + 1)
            resumed = False
            yield batch
            if resets != self._resets:
                return
        if self._left_early or resumed:
            self._start_epoch(self.epoch + 1)
            if resumed:  # the position was the end of its epoch
                yield from self

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next pass; a position that was loaded in it is kept."""
        if epoch != self.epoch or self._left_early:
            self._start_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """The position after the micro-batch handed out last, the same on every shard."""
        state: dict[str, Any] = {"epoch": self.epoch, "consumed": self._consumed}
        if self._keeps_own_state():
            state["dataset"] = self.dataset.state_dict()
        if self._request.order is not None:
            state["order"] = self._request.order.state_dict(self.epoch, self._consumed)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position, also one that was saved with another number of shards.

        Raises:
            CheckpointError: the dataset is shorter than the position.
        """
        consumed = int(state["consumed"])
        if not self._iterable and self._request.sampler is None and consumed > len(self._dealt):
            raise CheckpointError(
                f"the saved loader had consumed {consumed} samples of its epoch, but the dataset "
                f"has {len(self._dealt)}; load with the dataset that was trained on"
            )
        if self._request.order is not None:
            self._request.order.load_state_dict(state.get("order"))
        self._start_epoch(int(state["epoch"]))
        self._consumed = consumed
        self._dataset_state = state.get("dataset")
        self._resets += 1

    def _start_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self._consumed = 0
        self._left_early = False

    def _epoch_is_over(self) -> bool:
        if self._iterable or self._request.sampler is not None:
            return False  # only the end of the iteration tells
        left = len(self._dealt) - self._consumed
        return left < (self._deal.round_size if self._deal.drop_last else 1)

    @property
    def _dealt(self) -> Any:
        """What has as many items as an epoch."""
        return self.dataset if self._request.order is None else self._request.order

    def _keeps_own_state(self) -> bool:
        able = hasattr(self.dataset, "state_dict") and hasattr(self.dataset, "load_state_dict")
        return self._iterable and able and self._request.num_workers == 0

    def _batches(self) -> Iterator[Any]:
        """Micro-batches from the position to the end of the epoch."""
        request = self._request
        told: list[Any] = [self.dataset, request.sampler]
        for one in told:
            if hasattr(one, "set_epoch"):
                one.set_epoch(self.epoch)
        options: dict[str, Any] = {
            "collate_fn": request.collate_fn,
            "num_workers": request.num_workers,
            "pin_memory": request.pin_memory and torch.accelerator.is_available(),
            # Seeds workers; without it every pass would draw from the global stream.
            "generator": _generator("workers", *self._place(), self._consumed),
        }
        if self._iterable:
            skip = self._consumed
            if self._keeps_own_state() and self._dataset_state is not None:
                self.dataset.load_state_dict(self._dataset_state)
                self._dataset_state, skip = None, 0
            stream = _DealtStream(self.dataset, self._deal, skip, self._place())
            collate = request.collate_fn or torch.utils.data.default_collate
            options["collate_fn"] = _SeededCollate(collate, self._place())
            return iter(TorchLoader(stream, batch_size=None, **options))
        done = self._consumed // self._deal.round_size
        # torch's types are a list of indices, and a dataset that takes one
        batches: Any = enumerate(self._indices(), start=done)
        samples: Any = _SeededSamples(self.dataset, self._place())
        return iter(TorchLoader(samples, batch_sampler=batches, **options))

    def _place(self) -> tuple[int, int, int]:
        """What random numbers of workers depend on, beside the micro-batch."""
        return self._request.seed, self.epoch, self._request.shard

    def _indices(self) -> Iterator[Any]:
        request, deal = self._request, self._deal
        if request.order is not None:
            items = _rounds(iter(request.order.items(self.epoch, self._consumed)), deal)
            return ([index for item in batch for index in item] for batch in items)
        if request.sampler is not None:
            own = islice(iter(request.sampler), self._consumed // deal.num_shards, None)
            return _rounds(own, deal.alone)
        total = len(self.dataset)
        shuffle = request.route == "train" if request.shuffle is None else request.shuffle
        generator = _generator("order", request.seed, self.epoch)
        order = torch.randperm(total, generator=generator) if shuffle else torch.arange(total)
        starts = range(self._consumed, total, deal.round_size)
        rounds = (deal.batch(order[start : start + deal.round_size].tolist()) for start in starts)
        return (batch for batch in rounds if batch is not None)


class _SeededSamples:
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


class _SeededCollate:
    """Makes a micro-batch of (number, samples); workers draw from a seed of its own for each."""

    def __init__(self, collate: Callable[[Any], Any], place: tuple[int, ...]) -> None:
        self._collate = collate
        self._place = place

    def __call__(self, batch: tuple[int, Sequence[Any]]) -> Any:
        number, samples = batch
        if get_worker_info() is not None:
            _seed_process("collate", *self._place, number)
        return self._collate(samples)


class _DealtStream(IterableDataset[Any]):
    """This worker's micro-batches of a dataset's stream, as (number, samples).

    A worker draws random numbers of each round from a seed of its own, also while it reads past
    rounds. Where several read one stream they draw alike, so that a shuffle in it is the same.
    """

    def __init__(self, dataset: Any, deal: _Deal, skip: int, place: tuple[int, ...]) -> None:
        self._dataset = dataset
        self._deal = deal
        self._skip = skip
        self._place = place

    def __iter__(self) -> Iterator[tuple[int, Sequence[Any]]]:
        info = get_worker_info()
        worker, workers = (info.id, info.num_workers) if info is not None else (0, 1)
        deal = self._deal
        # torch takes micro-batches from workers in turn, from the first; whoever's turn it was at
        # the position is played by the first.
        done, head = divmod(self._skip, deal.round_size)
        role = (worker + done) % workers
        if hasattr(self._dataset, "set_shard"):
            given = done // workers + (role < done % workers)
            self._dataset.set_shard(deal.shard * workers + role, deal.num_shards * workers)
            rounds = self._rounds(deal.alone, count(role, workers), self._place)
            yield from islice(rounds, given, None)
        else:
            # Other shards have left a position inside of a round of these.
            rounds = self._rounds(deal, count(), self._place[:-1], head)
            yield from islice(rounds, done + worker, None, workers)

    def _rounds(
        self, deal: _Deal, numbers: Iterable[int], place: tuple[int, ...], head: int = 0
    ) -> Iterator[tuple[int, Sequence[Any]]]:
        stream = iter(self._dataset)
        for number in numbers:
            if get_worker_info() is not None:
                _seed_process("stream", *place, number)
            list(islice(stream, head))
            head = 0
            batch = deal.batch(list(islice(stream, deal.round_size)))
            if batch is None:
                return
            yield number, batch


def _rounds(stream: Iterator[Any], deal: _Deal) -> Iterator[Sequence[Any]]:
    while (batch := deal.batch(list(islice(stream, deal.round_size)))) is not None:
        yield batch


def _generator(*place: str | int) -> torch.Generator:
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


class RepeatingLoader:
    """An endless iterator over a loader, which it starts again whenever it ends.

    Args:
        loader: anything that can be iterated again and again.
    """

    def __init__(self, loader: Iterable[Any]) -> None:
        self.loader = loader
        self._iterator = iter(loader)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __len__(self) -> int:
        sized: Any = self.loader
        return len(sized)

    def __next__(self) -> Any:
        for _ in range(2):
            try:
                return next(self._iterator)
            except StopIteration:
                self._iterator = iter(self.loader)
        raise TrainingError(f"the {type(self.loader).__name__} to repeat yields nothing")


def endless_batches(loader: Iterable[Any] | None) -> Iterator[Any]:
    """Return the micro-batches of an engine's own training loader, again and again.

    Raises:
        TrainingError: there is none.
    """
    if loader is None:
        raise TrainingError(
            "train_batch() without an iterator needs training_data given to initialize()"
        )
    return RepeatingLoader(loader)


def _check(request: LoaderRequest) -> None:
    dataset, kind = request.dataset, type(request.dataset).__name__
    if request.batch_size < 1:
        raise ConfigError(f"a loader needs a batch size of at least 1, got {request.batch_size}")
    if not 0 <= request.shard < request.num_shards:
        raise ConfigError(f"there is no shard {request.shard} of {request.num_shards}")
    if isinstance(dataset, IterableDataset):
        return
    indexed = hasattr(dataset, "__len__") and hasattr(dataset, "__getitem__")
    if not indexed or isinstance(dataset, (Mapping, str, bytes)):
        raise ConfigError(
            "a dataset has __len__ and __getitem__, or is a torch IterableDataset; got "
            f"{kind}" + ("; give its dataset instead" if hasattr(dataset, "dataset") else "")
        )
    items = len(dataset if request.order is None else request.order)
    if not items:
        raise ConfigError(f"the dataset ({kind}) is empty")
    round_size = request.batch_size * request.num_shards
    if request.drop_last and request.sampler is None and items < round_size:
        raise ConfigError(
            f"the dataset has {items} samples, fewer than micro-batch {request.batch_size} "
            f"x {request.num_shards} data shards, so dropping the incomplete round leaves nothing"
        )


def build_loader(job: Job, dataset: Any, batch: Batch, **options: Any) -> DataLoader:
    """The loader of this rank's data shard.

    Args:
        job: mesh and hooks.
        dataset: map-style or iterable.
        batch: decides the micro-batch size.
        options: fields of :class:`~drivetrain.contracts.loop.loading.LoaderRequest` that override
        the config's.
    """
    fields: dict[str, Any] = {
        "batch_size": batch.micro_batch_size,
        "drop_last": job.plan.section(DataloaderDropLast).root,
        "shard": job.mesh.coordinate("dp"),
        "num_shards": job.mesh.size("dp"),
        "seed": job.plan.section(Seed).root,
    }
    fields.update({key: value for key, value in options.items() if value is not None})
    loader: DataLoader | None = job.hub.build_loader(job, LoaderRequest(dataset, **fields))
    assert loader is not None, "core's default loader answers last"
    return loader
