"""Streams go on where they were, whatever reads them; orders of datasets, loaders of scripts."""

from __future__ import annotations

import itertools
import json

import pytest
import torch
from dealt_loaders import OwnShards, OwnState, Stream, flatten, rounds, shards

from drivetrain.contracts import LoaderRequest
from drivetrain.engine.dealing import DealtStream
from drivetrain.engine.loader import RepeatingLoader, StatefulLoader, default_loader
from drivetrain.errors import CheckpointError, ConfigError


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("count", [1, 2, 3])
def test_a_stream_is_dealt_out_in_order_whatever_the_workers(count, workers):
    seen = rounds(shards(Stream(20), count, batch_size=2, num_workers=workers))
    assert flatten(seen)[:20] == list(range(20))


def test_a_stream_that_shards_itself_is_left_alone():
    loaders = shards(OwnShards(12), 3, batch_size=2)
    assert [flatten(list(loader)) for loader in loaders] == [
        [0, 3, 6, 9],
        [1, 4, 7, 10],
        [2, 5, 8, 11],
    ]


def test_streams_are_told_the_epoch():
    stream = Stream(4)
    (loader,) = shards(stream, 1, batch_size=2)
    list(loader)
    list(loader)
    assert stream.epochs == [0, 1]


def test_a_stream_with_its_own_state_is_not_read_again():
    (loader,) = shards(OwnState(10), 1, batch_size=2)
    iterator = iter(loader)
    assert [next(iterator), next(iterator)] == [[0, 1], [2, 3]]
    state = loader.state_dict()
    stream = OwnState(10)
    (fresh,) = shards(stream, 1, batch_size=2)
    fresh.load_state_dict(state)
    assert list(fresh) == [[4, 5], [6, 7], [8, 9]]
    assert stream.read == list(range(4, 10))


class OwnStateAndShards(OwnState):
    """Keeps every count-th number, and counts those alone."""

    def set_shard(self, index, count):
        self.shard = index, count

    def __iter__(self):
        index, count = self.shard
        while self.position * count + index < self.size:
            self.position += 1
            yield (self.position - 1) * count + index
        self.position = 0


def apart(make, count, batch_size, **options):
    """Shards with a dataset each, as processes have."""
    return [shards(make(), count, batch_size, **options)[shard] for shard in range(count)]


@pytest.mark.parametrize("workers", [0, 1, 2])
@pytest.mark.parametrize("make", [OwnState, OwnStateAndShards])
def test_states_of_streams_are_those_of_the_micro_batch_that_was_handed_out(make, workers):
    """Workers read ahead, so the state comes with each micro-batch."""

    def start():
        return apart(lambda: make(24), 2, 3, num_workers=workers)

    expected = rounds(start())
    for taken in (1, 2, 3) if not workers else (1, 3):
        loaders, fresh = start(), start()
        for _, iterator in itertools.product(range(taken), [iter(loader) for loader in loaders]):
            next(iterator)
        for old, new in zip(loaders, fresh, strict=True):
            new.load_state_dict(json.loads(json.dumps(old.state_dict())))
        assert rounds(fresh) == expected[taken:]


class Unskippable(OwnState):
    """Says when it is read from the beginning."""

    def __iter__(self):
        assert self.position, "read again"
        return super().__iter__()


@pytest.mark.parametrize(("before", "after"), [(1, 2), (4, 2), (2, 3)])
@pytest.mark.parametrize("workers", [0, 1])
def test_a_stream_with_a_state_goes_on_without_reading_on_any_shards(before, after, workers):
    loaders = apart(lambda: OwnState(60), before, 2)
    for _, iterator in itertools.product(range(3), [iter(loader) for loader in loaders]):
        next(iterator)
    fresh = apart(lambda: Unskippable(60), after, 2, num_workers=workers)
    for loader in fresh:
        loader.load_state_dict(loaders[0].state_dict())
    assert flatten(rounds(fresh))[: 60 - 6 * before] == list(range(6 * before, 60))


def test_a_stream_that_shards_itself_goes_on_on_as_many_readers_only():
    (loader, _) = shards(OwnShards(12), 2, 2)
    next(iter(loader))
    state = loader.state_dict()
    for count, workers in ((1, 0), (2, 2)):
        (other, *_) = shards(OwnShards(12), count, 2, num_workers=workers)
        with pytest.raises(CheckpointError, match="read by 2 shards x workers, now"):
            other.load_state_dict(state)


class SplitsItself(Stream):
    """Shards itself by torch's information of workers, as WebDataset's streams do."""

    def __iter__(self):
        info = torch.utils.data.get_worker_info()
        index, count = (info.id, info.num_workers) if info else (0, 1)
        return iter(range(index, self.size, count))


@pytest.mark.parametrize("count", [1, 2])
def test_a_stream_that_splits_itself_by_workers_loses_no_samples(count):
    seen = rounds(shards(SplitsItself(24), count, 2, num_workers=2))
    assert flatten(seen) == list(range(24))


def test_the_worker_is_hidden_from_a_stream_only_while_it_is_read(monkeypatch):
    told = object()
    monkeypatch.setattr(torch.utils.data._utils.worker, "_worker_info", told)
    monkeypatch.setattr("drivetrain.engine.dealing.get_worker_info", lambda: None)
    seen = []

    class Watches(Stream):
        def __iter__(self):
            seen.append(torch.utils.data.get_worker_info())
            yield from range(self.size)

    (loader,) = shards(Watches(4), 1, 2)
    for _ in DealtStream(Watches(4), loader._deal, 0, (0, 0, 0), {}):
        assert torch.utils.data.get_worker_info() is told
    assert seen == [None]


class Backwards:
    """The last sample first, in every epoch."""

    def __init__(self, size, seed):
        self.size, self.seed = size, seed

    def __len__(self):
        return self.size

    def items(self, epoch, start):
        return ([self.size - 1 - number] for number in range(start, self.size))

    def state_dict(self, epoch, start):
        return None

    def load_state_dict(self, state):
        assert state is None


class SaysItsOrder(list):
    def sample_order(self, seed):
        return Backwards(len(self), seed)


def test_a_dataset_says_in_which_order_it_is_best_read():
    data = SaysItsOrder(range(12))
    loader = default_loader(LoaderRequest(data, 4, collate_fn=list, seed=3))
    assert loader._request.order.seed == 3
    assert list(loader) == [[11, 10, 9, 8], [7, 6, 5, 4], [3, 2, 1, 0]]
    loader.load_state_dict({"epoch": 1, "consumed": 8, "order": None})
    assert list(loader) == [[3, 2, 1, 0]]
    for options in ({"route": "eval"}, {"shuffle": False}, {"sampler": range(12)}):
        plain = default_loader(LoaderRequest(data, 4, collate_fn=list, **options))
        assert flatten(list(plain)) == list(range(12))


class ScriptsLoader:
    """What torchdata's StatefulDataLoader is to a script: it yields, and knows its position."""

    batch_size = 2

    def __init__(self, size=8):
        self.size, self.position, self.epochs = size, 0, []

    def __len__(self):
        return self.size // 2

    def __iter__(self):
        while self.position < self.size:
            self.position += 2
            yield [self.position - 2, self.position - 1]
        self.position = 0

    def set_epoch(self, epoch):
        self.epochs.append(epoch)

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def stateful(loader, shard=0, num_shards=1, **options):
    request = LoaderRequest(loader, 2, shard=shard, num_shards=num_shards, **options)
    found = default_loader(request)
    assert isinstance(found, StatefulLoader)
    return found


@pytest.mark.parametrize("taken", range(5))
def test_a_scripts_loader_goes_on_where_it_was(taken):
    loader = stateful(ScriptsLoader())
    iterator = iter(loader)
    for _ in range(taken):
        next(iterator)
    state = json.loads(json.dumps(loader.state_dict()))
    fresh = stateful(ScriptsLoader())
    fresh.load_state_dict(state)
    own = [[0, 1], [2, 3], [4, 5], [6, 7]]
    assert list(fresh) == (own[taken:] or own)
    assert list(fresh) == own
    assert fresh.loader.epochs[:1] == [0]
    assert fresh.loader.epochs[-1] >= 1
    assert len(fresh) == 4


def test_loading_ends_the_pass_of_a_scripts_loader():
    loader = stateful(ScriptsLoader())
    repeating = RepeatingLoader(loader)
    next(repeating)
    loader.load_state_dict({"epoch": 0, "place": [0, 1], "loader": {"position": 4}})
    assert [next(repeating) for _ in range(3)] == [[4, 5], [6, 7], [0, 1]]


def test_a_scripts_loader_that_cannot_be_used_is_refused():
    with pytest.raises(ConfigError, match=r"of 2 samples, and the config's have 4"):
        default_loader(LoaderRequest(ScriptsLoader(), 4))
    with pytest.raises(ConfigError, match="makes micro-batches itself"):
        stateful(ScriptsLoader(), collate_fn=list)
    loader = ScriptsLoader()
    loader.sampler = torch.utils.data.RandomSampler(range(8))
    with pytest.raises(ConfigError, match="each of 2 data shards the same samples"):
        stateful(loader, num_shards=2)
    state = stateful(ScriptsLoader(), 1, 2).state_dict()
    with pytest.raises(CheckpointError, match=r"for shard 0 of 1, but for \[1, 2\]"):
        stateful(ScriptsLoader()).load_state_dict(state)
    with pytest.raises(CheckpointError, match="a loader of another kind"):
        stateful(ScriptsLoader()).load_state_dict({"epoch": 0, "consumed": 3})
