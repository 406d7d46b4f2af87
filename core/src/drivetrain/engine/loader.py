"""The data loader: sharded, reshuffled every epoch, and resumable at every position."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
from torch.utils.data import DataLoader as TorchLoader
from torch.utils.data import IterableDataset

from drivetrain.contracts.loop.loading import LoaderRequest
from drivetrain.engine.dealing import (
    Deal,
    DealtStream,
    SeededCollate,
    SeededSamples,
    generator_of,
    rounds_of,
)
from drivetrain.errors import CheckpointError, ConfigError, TrainingError
from drivetrain.sections.data import DataloaderDropLast, Seed

if TYPE_CHECKING:
    from drivetrain.contracts.loop.batch import Batch
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job


class DataLoader:
    """Yields this shard's micro-batches, one epoch per pass.

    Every pass over the loader is a new epoch with a new order, the same on all ranks and different
    from epoch to epoch. A pass that was left early is not continued, except after
    :meth:`load_state_dict`, which also ends a pass that is under way.

    Map-style datasets are dealt out exactly once per epoch (the last round aside, see
    ``drop_last``), in the order that a method ``sample_order(seed)`` of the dataset returns, if it
    has one. Of an ``IterableDataset`` every worker of every shard reads the whole stream, as if it
    were alone, and keeps its own micro-batches; a dataset that does better has a method
    ``set_shard(index, count)``, called in each worker before each pass, and then yields only that
    share, as many samples on every shard. Samplers and datasets with ``set_epoch(epoch)`` are told
    the epoch. A position is resumed without loading what comes before it, but an
    ``IterableDataset`` without ``state_dict`` and ``load_state_dict`` has to be read past it. A
    stream that shards itself is resumed on as many shards and workers only.

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
        self._deal = Deal(request.batch_size, request.shard, request.num_shards, request.drop_last)
        self._iterable = isinstance(request.dataset, IterableDataset)
        self._consumed = 0  # samples of this epoch handed out on all shards together
        self._left_early = False
        self._resets = 0
        self._dataset_states: dict[str, Any] = {}  # reader -> its state after its latest round

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
        if self._iterable:
            state |= {"readers": self._readers, "dataset": dict(self._dataset_states)}
        if self._request.order is not None:
            state["order"] = self._request.order.state_dict(self.epoch, self._consumed)
        return state

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from a position, also one that was saved with another number of shards.

        Raises:
            CheckpointError: the dataset is shorter than the position, or shards itself otherwise.
        """
        consumed, readers = int(state["consumed"]), state.get("readers", self._readers)
        if consumed and self._iterable and readers != self._readers:
            raise CheckpointError(
                f"{type(self.dataset).__name__} shards itself (set_shard), and was read by "
                f"{readers} shards x workers, now {self._readers}: other samples would come; go on "
                "with as many, or use a dataset that leaves sharding to the loader"
            )
        if not self._iterable and self._request.sampler is None and consumed > len(self._dealt):
            raise CheckpointError(
                f"the saved loader had consumed {consumed} samples of its epoch, but the dataset "
                f"has {len(self._dealt)}; load with the dataset that was trained on"
            )
        if self._request.order is not None:
            self._request.order.load_state_dict(state.get("order"))
        self._start_epoch(int(state["epoch"]))
        self._consumed = consumed
        self._dataset_states = dict(state.get("dataset") or {})
        self._resets += 1

    def _start_epoch(self, epoch: int) -> None:
        self.epoch = epoch
        self._consumed = 0
        self._left_early = False
        self._dataset_states = {}

    def _epoch_is_over(self) -> bool:
        if self._iterable or self._request.sampler is not None:
            return False  # only the end of the iteration tells
        left = len(self._dealt) - self._consumed
        return left < (self._deal.round_size if self._deal.drop_last else 1)

    @property
    def _dealt(self) -> Any:
        """What has as many items as an epoch."""
        return self.dataset if self._request.order is None else self._request.order

    @property
    def _readers(self) -> int:
        """Between how many a stream shards itself; 1 if it leaves that to the loader."""
        own = hasattr(self.dataset, "set_shard")
        return self._deal.num_shards * max(1, self._request.num_workers) if own else 1

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
            "generator": generator_of("workers", *self._place(), self._consumed),
        }
        if self._iterable:
            states = dict(self._dataset_states)
            stream = DealtStream(self.dataset, self._deal, self._consumed, self._place(), states)
            collate = request.collate_fn or torch.utils.data.default_collate
            options["collate_fn"] = SeededCollate(collate, self._place())
            return self._noted(TorchLoader(stream, batch_size=None, **options))
        done = self._consumed // self._deal.round_size
        # torch's types are a list of indices, and a dataset that takes one
        batches: Any = enumerate(self._indices(), start=done)
        samples: Any = SeededSamples(self.dataset, self._place())
        return iter(TorchLoader(samples, batch_sampler=batches, **options))

    def _noted(self, marked: Iterable[Any]) -> Iterator[Any]:
        """Micro-batches of a stream; keeps the state that comes with each."""
        for batch, (reader, state) in marked:
            if state is not None:
                self._dataset_states[reader] = state
            yield batch

    def _place(self) -> tuple[int, int, int]:
        """What random numbers of workers depend on, beside the micro-batch."""
        return self._request.seed, self.epoch, self._request.shard

    def _indices(self) -> Iterator[Any]:
        request, deal = self._request, self._deal
        if request.order is not None:
            items = rounds_of(iter(request.order.items(self.epoch, self._consumed)), deal)
            return ([index for item in batch for index in item] for batch in items)
        if request.sampler is not None:
            own = islice(iter(request.sampler), self._consumed // deal.num_shards, None)
            return rounds_of(own, deal.alone)
        total = len(self.dataset)
        shuffle = _shuffles(request)
        generator = generator_of("order", request.seed, self.epoch)
        order = torch.randperm(total, generator=generator) if shuffle else torch.arange(total)
        starts = range(self._consumed, total, deal.round_size)
        rounds = (deal.batch(order[start : start + deal.round_size].tolist()) for start in starts)
        return (batch for batch in rounds if batch is not None)


class StatefulLoader:
    """A script's own loader that knows its position, such as torchdata's ``StatefulDataLoader``.

    It decides which samples come, for each shard by itself. So its state is each rank's own, and
    goes on on the same shard of as many.

    Args:
        request: its dataset is the loader.

    Raises:
        ConfigError: every shard would get the same samples, or micro-batches have another size.
    """

    def __init__(self, request: LoaderRequest) -> None:
        self.loader, self.batch_size, self.epoch = request.dataset, request.batch_size, 0
        self._place = [request.shard, request.num_shards]
        self._resets, self._under_way, self._resumed = 0, False, False
        kind, size = type(self.loader).__name__, getattr(self.loader, "batch_size", None)
        if size not in (None, request.batch_size) or request.collate_fn or request.order:
            raise ConfigError(
                f"a {kind} makes micro-batches itself, of {size} samples, and the config's have "
                f"{request.batch_size}: set train_micro_batch_size_per_gpu, collate_fn there, or "
                "give its dataset instead"
            )
        alike = (torch.utils.data.RandomSampler, torch.utils.data.SequentialSampler)
        if request.num_shards > 1 and isinstance(getattr(self.loader, "sampler", None), alike):
            raise ConfigError(
                f"the {kind} would give each of {request.num_shards} data shards the same samples: "
                "give it a StatefulDistributedSampler, or give its dataset instead"
            )

    def __len__(self) -> int:
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        if self._under_way:  # left early
            self.epoch += 1
        self._under_way, resets = True, self._resets
        resumed, self._resumed = self._resumed, False
        told: list[Any] = [self.loader, getattr(self.loader, "sampler", None)]
        for one in told:
            if hasattr(one, "set_epoch"):
                one.set_epoch(self.epoch)
        for batch in self.loader:
            resumed = False
            yield batch
            if resets != self._resets:
                return
        self.epoch, self._under_way = self.epoch + 1, False
        if resumed:  # the position was the end of its epoch
            yield from self

    def state_dict(self) -> dict[str, Any]:
        """The position of this shard after the micro-batch handed out last."""
        return {"epoch": self.epoch, "place": self._place, "loader": self.loader.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Continue from the position of the same shard.

        Raises:
            CheckpointError: it is that of another shard, or of another kind of loader.
        """
        if list(state.get("place", ())) != self._place:
            shard, count = self._place
            raise CheckpointError(
                f"the checkpoint has no position of a {type(self.loader).__name__} for shard "
                f"{shard} of {count}, but for {state.get('place', 'a loader of another kind')}; go "
                "on with as many, or give its dataset, which goes on on any number"
            )
        self.loader.load_state_dict(state["loader"])
        self.epoch, self._under_way, self._resumed = int(state["epoch"]), False, True
        self._resets += 1


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

    def close(self) -> None:
        """End the pass that is under way, and with it the workers that read for it.

        Left to the garbage collector, torch would wait 5 s for each of them: their queues, which
        are in the same cycle, are closed before they are told to end.
        """
        under_way, self._iterator = self._iterator, iter(())
        if hasattr(under_way, "close"):
            under_way.close()


def endless_batches(loader: Iterable[Any] | None, engine: Engine) -> RepeatingLoader:
    """Return the micro-batches of a training loader, again and again, until the engine ends.

    Raises:
        TrainingError: there is none.
    """
    if loader is None:
        raise TrainingError(
            "train_batch() without an iterator needs training_data given to initialize()"
        )
    batches = RepeatingLoader(loader)
    engine.on_destroy(batches.close)
    engine.job.on_close(batches.close)  # also where the script does not destroy the engine
    return batches


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


def default_loader(request: LoaderRequest) -> DataLoader | StatefulLoader:
    """The loader of a request that no plugin has an answer to."""
    dataset = request.dataset
    able = all(hasattr(dataset, n) for n in ("__iter__", "state_dict", "load_state_dict"))
    if able and not isinstance(dataset, IterableDataset) and not hasattr(dataset, "__getitem__"):
        return StatefulLoader(request)
    order = getattr(dataset, "sample_order", None)
    if order is not None and _shuffles(request) and not (request.order or request.sampler):
        request = replace(request, order=order(request.seed))
    return DataLoader(request)


def _shuffles(request: LoaderRequest) -> bool:
    return request.route == "train" if request.shuffle is None else request.shuffle


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
