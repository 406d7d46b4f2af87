"""Every sample once per epoch, on any number of shards, from any position."""

from __future__ import annotations

import itertools
import json
import multiprocessing
import random
from collections.abc import Iterator
from dataclasses import replace

import pytest
import torch
from dealt_loaders import OwnShards, Stream, flatten, rounds, shards
from torch.utils.data import Dataset, DistributedSampler

import drivetrain
from drivetrain.contracts import LoaderRequest
from drivetrain.engine.loader import DataLoader, RepeatingLoader
from drivetrain.errors import CheckpointError, ConfigError, TrainingError

try:
    import numpy as np
except ImportError:
    np = None


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("size", [1, 7, 12, 24, 25])
def test_every_sample_comes_once_and_only_the_last_round_repeats_some(count, size):
    seen = rounds(shards(range(size), count, batch_size=3))
    assert sorted(set(flatten(seen))) == list(range(size))
    full = flatten(seen[:-1])
    assert len(set(full)) == len(full)
    last = size - len(full)
    assert len(seen[-1]) == -(-last // count) * count
    assert not set(seen[-1]) & set(full)
    repeats = max(seen[-1].count(sample) for sample in seen[-1])
    assert repeats == -(-len(seen[-1]) // last)


@pytest.mark.parametrize("count", [1, 2, 3])
def test_dropping_the_last_round_gives_full_batches_of_distinct_samples(count):
    seen = rounds(shards(range(25), count, batch_size=4, drop_last=True))
    assert len(seen) == 25 // (4 * count)
    assert len(set(flatten(seen))) == len(seen) * 4 * count


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("sampler", [None, range(13)])
def test_len_is_the_number_of_micro_batches(drop_last, sampler):
    for loader in shards(range(25), 2, batch_size=4, drop_last=drop_last, sampler=sampler):
        assert len(list(loader)) == len(loader)


def test_training_reshuffles_every_epoch_and_agrees_over_shards():
    loaders = shards(range(40), 2, batch_size=5, seed=3)
    first, second = rounds(loaders), rounds(loaders)
    assert first != second
    assert sorted(flatten(first)) == sorted(flatten(second)) == list(range(40))
    assert flatten(first) != list(range(40))
    assert rounds(shards(range(40), 2, batch_size=5, seed=3)) == first
    assert rounds(shards(range(40), 2, batch_size=5, seed=4)) not in (first, second)


@pytest.mark.parametrize("options", [{"route": "eval"}, {"route": "predict"}, {"shuffle": False}])
def test_other_routes_keep_the_order(options):
    (loader,) = shards(range(10), 1, batch_size=4, **options)
    for _ in range(2):
        assert list(loader) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_the_order_of_rounds_is_the_same_for_any_number_of_shards():
    orders = [flatten(rounds(shards(range(24), n, batch_size=12 // n))) for n in (1, 2, 3, 4)]
    assert all(order == orders[0] for order in orders)


def resumed(loaders, taken, dataset, count, batch_size, **options):
    """Positions saved after ``taken`` rounds of ``loaders``, loaded into new loaders."""
    iterators = [iter(loader) for loader in loaders]
    for _ in range(taken):
        for iterator in iterators:
            next(iterator)
    states = [json.loads(json.dumps(loader.state_dict())) for loader in loaders]
    assert all(state == states[0] for state in states)
    fresh = shards(dataset, count, batch_size, **options)
    for loader in fresh:
        loader.load_state_dict(states[0])
    return fresh


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("count", [1, 2])
@pytest.mark.parametrize("make", [range, Stream, OwnShards], ids=["map", "stream", "own shards"])
def test_a_loaded_position_continues_exactly_at_every_round(make, count, workers):
    size = 24 if make is OwnShards else 22  # a dataset that shards itself does so evenly
    options = {"num_workers": workers, "seed": 1}
    reference = shards(make(size), count, batch_size=3, **options)
    expected = rounds(reference) + rounds(reference)
    epoch = len(expected) // 2
    for taken in range(0, epoch + 2, 1 if not workers else 3):
        loaders = shards(make(size), count, batch_size=3, **options)
        if taken > epoch:
            rounds(loaders)
        loaders = resumed(loaders, taken % (epoch + 1), make(size), count, 3, **options)
        follow = rounds(loaders)
        follow += rounds(loaders)
        begin = taken if taken <= epoch else epoch + taken % (epoch + 1)
        assert follow[: len(expected) - begin] == expected[begin:]


@pytest.mark.parametrize("make", [range, Stream], ids=["map", "stream"])
@pytest.mark.parametrize(("before", "after"), [(1, 2), (2, 1), (2, 3), (4, 2), (3, 4)])
def test_another_number_of_shards_continues_the_same_order(make, before, after):
    size = 60
    expected = flatten(rounds(shards(make(size), 1, batch_size=60, seed=5)))
    for taken in range(1, 5):
        loaders = shards(make(size), before, batch_size=2, seed=5)
        fresh = resumed(loaders, taken, make(size), after, batch_size=3, seed=5)
        rest = flatten(rounds(fresh))
        assert rest[: size - taken * before * 2] == expected[taken * before * 2 :]


def test_an_end_that_only_the_new_layout_reaches_begins_the_next_epoch():
    loaders = shards(range(10), 1, batch_size=3, drop_last=True)
    (fresh,) = resumed(loaders, 2, range(10), 1, batch_size=5, drop_last=True)
    (other,) = shards(range(10), 1, batch_size=5, drop_last=True)
    list(other)
    assert list(fresh) == list(other)
    assert fresh.epoch == 2


def test_a_pass_left_early_is_followed_by_a_new_epoch():
    (loader,) = shards(range(12), 1, batch_size=4)
    (other,) = shards(range(12), 1, batch_size=4)
    next(iter(loader))
    list(other)
    assert list(loader) == list(other)


def test_set_epoch_chooses_the_order_but_keeps_a_loaded_position():
    (loader,) = shards(range(12), 1, batch_size=4)
    epochs = [list(loader) for _ in range(3)]
    loader.set_epoch(1)
    assert list(loader) == epochs[1]
    loader.load_state_dict({"epoch": 2, "consumed": 4})
    loader.set_epoch(2)
    assert list(loader) == epochs[2][1:]
    loader.set_epoch(0)
    next(iter(loader))
    loader.set_epoch(0)
    assert list(loader) == epochs[0]


def test_loading_ends_a_pass_under_way_so_a_repeating_loader_follows():
    (loader,) = shards(range(12), 1, batch_size=4)
    epochs = [list(loader) for _ in range(2)]
    repeating = RepeatingLoader(loader)
    next(repeating)
    loader.load_state_dict({"epoch": 0, "consumed": 8})
    assert [next(repeating) for _ in range(3)] == [epochs[0][2], *epochs[1][:2]]


def test_a_repeating_loader_never_ends_and_reshuffles():
    (loader,) = shards(range(8), 1, batch_size=4)
    repeating = RepeatingLoader(loader)
    assert len(repeating) == 2
    batches = [next(repeating) for _ in range(8)]
    assert iter(repeating) is repeating
    passes = [flatten(batches[i : i + 2]) for i in range(0, 8, 2)]
    assert all(sorted(one) == list(range(8)) for one in passes)
    assert len({tuple(one) for one in passes}) > 1


def test_repeating_nothing_is_an_error_not_a_hang():
    with pytest.raises(TrainingError, match="list to repeat yields nothing"):
        next(RepeatingLoader([]))


def test_a_clients_sampler_decides_and_is_told_the_epoch():
    sampler = DistributedSampler(range(20), num_replicas=2, rank=1, seed=9)
    (loader,) = shards(range(20), 1, batch_size=4, sampler=sampler)
    epochs = [flatten(list(loader)) for _ in range(2)]
    for epoch, seen in enumerate(epochs):
        sampler.set_epoch(epoch)
        assert seen == list(sampler)
    loader.load_state_dict({"epoch": 1, "consumed": 8})
    assert flatten(list(loader)) == epochs[1][8:]


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("size", [24, 31])
def test_a_clients_sampler_goes_on_where_it_was_on_every_shard(count, size):
    """Each shard's sampler holds its own samples only, and skips no more than it has handed out."""

    def make():
        return [
            DataLoader(
                LoaderRequest(
                    range(size),
                    2,
                    collate_fn=list,
                    shard=shard,
                    num_shards=count,
                    sampler=DistributedSampler(range(size), num_replicas=count, rank=shard, seed=9),
                )
            )
            for shard in range(count)
        ]

    expected = [list(loader) for loader in make()]
    for taken in range(1, len(expected[0])):
        loaders = make()
        iterators = [iter(loader) for loader in loaders]
        for _ in range(taken):
            for iterator in iterators:
                next(iterator)
        fresh = make()
        for old, new in zip(loaders, fresh, strict=True):
            new.load_state_dict(json.loads(json.dumps(old.state_dict())))
        assert [list(loader) for loader in fresh] == [epoch[taken:] for epoch in expected]


def test_batches_are_tensors_by_default():
    class Pairs(Dataset):
        def __len__(self):
            return 4

        def __getitem__(self, index):
            return torch.full((3,), float(index)), index

    loader = DataLoader(LoaderRequest(Pairs(), 2, shuffle=False))
    inputs, labels = next(iter(loader))
    assert inputs.tolist() == [[0.0] * 3, [1.0] * 3]
    assert labels.tolist() == [0, 1]
    (batch,) = DataLoader(LoaderRequest(Stream(2), 2))
    assert torch.equal(batch, torch.tensor([0, 1]))


class Noise(Dataset):
    """Random numbers, drawn where they are loaded."""

    def __len__(self):
        return 4

    def __getitem__(self, index):
        return torch.rand(()).item()


def test_workers_draw_other_numbers_on_every_shard_but_the_same_in_every_run():
    first = [list(loader) for loader in shards(Noise(), 2, batch_size=2, num_workers=1)]
    again = [list(loader) for loader in shards(Noise(), 2, batch_size=2, num_workers=1)]
    assert first == again
    assert first[0] != first[1]


def test_loading_data_leaves_the_global_random_state_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    rounds(shards(range(8), 2, batch_size=2))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize(
    ("dataset", "message"),
    [
        (7, "got int"),
        ((number for number in range(3)), "got generator"),
        ({"a": 1}, "got dict"),
        ("text", "got str"),
        ([], r"dataset \(list\) is empty"),
        (torch.utils.data.DataLoader([1]), "got DataLoader; give its dataset instead"),
    ],
)
def test_what_is_no_dataset_is_refused(dataset, message):
    with pytest.raises(ConfigError, match=message):
        DataLoader(LoaderRequest(dataset, 2))


def test_sizes_that_make_no_batch_are_refused():
    with pytest.raises(ConfigError, match="batch size of at least 1, got 0"):
        DataLoader(LoaderRequest(range(4), 0))
    with pytest.raises(ConfigError, match="3 samples, fewer than micro-batch 2 x 2 data shards"):
        DataLoader(LoaderRequest(range(3), 2, num_shards=2, drop_last=True))
    with pytest.raises(ConfigError, match="no shard 2 of 2"):
        DataLoader(LoaderRequest(range(3), 2, shard=2, num_shards=2))


def test_a_position_beyond_the_dataset_is_refused():
    (loader,) = shards(range(8), 1, batch_size=2)
    with pytest.raises(CheckpointError, match=r"had consumed 10 samples .* dataset has 8"):
        loader.load_state_dict({"epoch": 0, "consumed": 10})


def test_the_length_of_a_stream_without_one_is_a_type_error():
    with pytest.raises(TypeError):
        len(DataLoader(LoaderRequest(Stream(4), 2)))


def noise():
    """What every generator of the process draws next."""
    drawn = [torch.rand(()).item(), random.random()]
    return [*drawn, np.random.random()] if np is not None else drawn


class Augmented(Dataset):
    def __len__(self):
        return 24

    def __getitem__(self, index):
        return index, noise()


class AugmentedStream(Stream):
    """Shuffles in a buffer, which has to be the same for all that read it."""

    def __iter__(self):
        buffer = []
        for index in range(self.size):
            buffer.append(index)
            if len(buffer) > 4:
                yield buffer.pop(random.randrange(4)), noise()
        yield from ((index, noise()) for index in buffer)


class AugmentedShards(OwnShards):
    def __iter__(self):
        indices = super().__iter__()
        return ((index, noise()) for index in indices)


def masked(samples):
    return samples, noise()


AUGMENTED = [Augmented(), AugmentedStream(24), AugmentedShards(24)]


@pytest.mark.parametrize("dataset", AUGMENTED, ids=lambda one: type(one).__name__)
def test_random_numbers_of_workers_go_on_after_a_resume(dataset):
    def loaders():
        request = LoaderRequest(dataset, 3, num_workers=2, num_shards=2, collate_fn=masked)
        return [DataLoader(replace(request, shard=shard)) for shard in range(2)]

    expected = [[*loader, *loader] for loader in loaders()]
    drawn = [n for batches in expected for samples, extra in batches for n in extra]
    drawn += [
        n for batches in expected for samples, _ in batches for _, own in samples for n in own
    ]
    assert len(set(drawn)) == len(drawn)
    indices = [i for batches in expected for samples, _ in batches[:4] for i, _ in samples]
    assert sorted(indices) == list(range(24))
    for taken in (1, 2):
        for batches, first, fresh in zip(expected, loaders(), loaders(), strict=True):
            iterator = iter(first)
            for _ in range(taken):
                next(iterator)
            fresh.load_state_dict(first.state_dict())
            assert [*fresh, *fresh] == batches[taken:]


def test_random_numbers_of_samples_do_not_depend_on_the_workers():
    found = [
        list(DataLoader(LoaderRequest(Augmented(), 3, num_workers=workers, collate_fn=masked)))
        for workers in (1, 2)
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("end", ["destroy", "close"])
def test_workers_of_the_engines_loader_end_with_it(end: str) -> None:
    # What is left to the garbage collector is waited for, 5 s a worker, and leaves files behind.
    config = {"train_batch_size": 2, "optimizer": {"type": "SGD"}}
    engine, *_ = drivetrain.initialize(model=Squares(), config=config)
    job = engine.job
    engine.training_dataloader = engine.deepspeed_io(Halves(), num_workers=2)
    engine.train_batch()
    workers = multiprocessing.active_children()
    assert len(workers) == 2
    (engine.destroy if end == "destroy" else job.close)()
    assert not any(worker.is_alive() for worker in workers)
    job.close()


class Halves(torch.utils.data.Dataset[torch.Tensor]):
    def __len__(self) -> int:
        return 32

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index / 2])


class Squares(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(1))

    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        return (self.weight - inputs).square().mean()


def test_a_stream_of_unknown_length_is_the_engines_own_data() -> None:
    config = {"train_batch_size": 2, "gradient_clipping": 0.0}
    config |= {"optimizer": {"type": "SGD", "params": {"lr": 0.25}}}
    engine, *_ = drivetrain.initialize(model=Squares(), training_data=Endless(), config=config)
    losses = [float(engine.train_batch()) for _ in range(3)]
    engine.job.close()
    assert losses == [1.0, 0.25, 0.0625]  # half of the way to 1 in each step


class Endless(torch.utils.data.IterableDataset[torch.Tensor]):
    def __iter__(self) -> Iterator[torch.Tensor]:
        return itertools.repeat(torch.ones(1))
