"""The order of samples in shards: once an epoch, whatever reads them, and few shards a reader."""

from __future__ import annotations

import itertools
import json
from typing import Any

import numpy as np
import pytest
from drivetrain_data_efficiency import ShardOrder

from drivetrain.contracts import LoaderRequest
from drivetrain.engine.loader import DataLoader
from drivetrain.errors import CheckpointError, ConfigError

COUNTS = [7, 0, 12, 5, 9, 1, 14, 12]
SAMPLES = sum(COUNTS)


def epoch_of(order: ShardOrder, epoch: int = 0, start: int = 0) -> list[int]:
    return [sample for (sample,) in order.items(epoch, start)]


@pytest.mark.parametrize("lanes", [1, 2, 5, 64])
@pytest.mark.parametrize("run", [1, 3])
@pytest.mark.parametrize("block", [1, 10, 1000])
def test_every_sample_comes_once_an_epoch_in_another_order(
    lanes: int, run: int, block: int
) -> None:
    order = ShardOrder(COUNTS, seed=1, lanes=lanes, run=run, block=block)
    epochs = [epoch_of(order, epoch) for epoch in range(3)]
    assert all(sorted(epoch) == list(range(SAMPLES)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert len(order) == SAMPLES
    for start in (0, 1, 17, SAMPLES - 1, SAMPLES):
        assert epoch_of(order, 2, start) == epochs[2][start:]


def test_lanes_give_runs_in_turn_and_are_shuffled_within_blocks_alone() -> None:
    """One sample at a time, with plain lists, from the description of the order."""
    lanes, run, block = 3, 2, 4

    def by_lane(order: ShardOrder) -> list[list[int]]:
        ours: list[list[int]] = [[] for _ in range(lanes)]
        for place, sample in enumerate(epoch_of(order)):
            ours[place // run % lanes].append(sample)
        return ours

    keys = {"seed": 5, "lanes": lanes, "run": run}
    plain = by_lane(ShardOrder(COUNTS, **keys, block=1))
    row = [sample for lane in plain for sample in lane]
    starts = np.cumsum([0, *COUNTS]).tolist()
    shards = [list(range(a, b)) for a, b in itertools.pairwise(starts) if b > a]
    turns = sorted(shards, key=lambda own: row.index(own[0]))
    assert row == [sample for own in turns for sample in own]
    assert turns != shards
    for lane, shuffled in zip(plain, by_lane(ShardOrder(COUNTS, **keys, block=block)), strict=True):
        assert lane != shuffled
        for first in range(0, len(lane), block):
            part = slice(first, first + block)
            assert sorted(lane[part]) == sorted(shuffled[part])


def loaders(order: ShardOrder, ranks: int, micro: int, workers: int = 0) -> list[DataLoader]:
    return [
        DataLoader(
            LoaderRequest(
                range(len(order)),
                micro,
                collate_fn=list,
                shard=rank,
                num_shards=ranks,
                order=order,
                num_workers=workers,
            )
        )
        for rank in range(ranks)
    ]


def test_four_ranks_then_two_then_three_give_each_sample_once() -> None:
    """The rule: global batch n of an epoch has the positions [n G, (n + 1) G) of one order."""
    counts = [11, 24, 13, 24]  # 72 samples; a global batch has 12
    reference = epoch_of(ShardOrder(counts, seed=3, lanes=4, run=3, block=9))
    seen: list[list[int]] = []
    state: Any = None
    for ranks, micro, batches in ((4, 3, 2), (2, 2, 2), (3, 4, 2)):
        group = loaders(ShardOrder(counts, seed=3, lanes=4, run=3, block=9), ranks, micro)
        for loader in group:
            loader.load_state_dict(state) if state else None
        iterators = [iter(loader) for loader in group]
        for _ in range(batches):
            rounds = 12 // (ranks * micro)  # of accumulation
            parts = [next(it) for _ in range(rounds) for it in iterators]
            seen.append([sample for part in parts for sample in part])
        states = [json.loads(json.dumps(loader.state_dict())) for loader in group]
        assert all(one == states[0] for one in states)
        state = states[0]
    assert sorted(sample for batch in seen for sample in batch) == list(range(72))
    for number, batch in enumerate(seen):
        assert batch == reference[12 * number : 12 * number + 12]
    assert state["epoch"] == 1


@pytest.mark.parametrize(("ranks", "workers"), [(4, 1), (2, 2), (1, 4), (2, 1), (1, 1)])
def test_each_lane_has_one_reader_where_lanes_are_a_multiple(ranks: int, workers: int) -> None:
    counts, lanes, micro = [50] * 40, 4, 5
    order = ShardOrder(counts, seed=2, lanes=lanes, run=micro, block=100)
    readers: dict[int, set[tuple[int, int]]] = {}
    for rank, loader in enumerate(loaders(order, ranks, micro)):
        for number, batch in enumerate(loader):  # torch gives them to workers in turn
            for sample in batch:
                readers.setdefault(sample // 50, set()).add((rank, number % workers))
    crossing = [shard for shard, own in readers.items() if len(own) > 1]
    assert len(crossing) <= lanes - 1  # a shard that lies on the border of two lanes
    assert all(len(own) <= 2 for own in readers.values())


def test_a_million_shards_begin_in_a_moment_wherever_the_position_is() -> None:
    """Counted, not timed: the order of a chunk is computed, and nothing before it."""
    counts = np.full(1_000_000, 1000)
    order = ShardOrder(counts, seed=1, lanes=8, run=16, block=4000)
    computed: list[int] = []
    inner = order.samples

    def counting(epoch: int, start: int, stop: int) -> Any:
        computed.append(stop - start)
        return inner(epoch, start, stop)

    order.samples = counting  # type: ignore[method-assign]
    next(order.items(3, 987_654_321))
    assert sum(computed) <= 1 << 14


def test_blocks_are_shuffled_evenly() -> None:
    order = ShardOrder([100], seed=0, block=100)
    first = [epoch_of(order, epoch)[0] for epoch in range(400)]
    assert len(set(first)) > 90
    assert 40 < sum(first) / len(first) < 60


def test_another_order_than_the_checkpoints_is_refused() -> None:
    keys = {"seed": 1, "lanes": 2, "run": 3, "block": 4}
    state = json.loads(json.dumps(ShardOrder(COUNTS, **keys).state_dict(0, 8)))
    ShardOrder(COUNTS, **keys).load_state_dict(state)
    for change in ({"seed": 2}, {"lanes": 3}, {"run": 1}, {"block": 5}):
        (name, value), *_ = change.items()
        with pytest.raises(CheckpointError, match=rf"{name} {keys[name]}, now {value}"):
            ShardOrder(COUNTS, **{**keys, **change}).load_state_dict(state)
    with pytest.raises(CheckpointError, match="samples 60, now 61; digest"):
        ShardOrder([*COUNTS[:-1], 13], **keys).load_state_dict(state)
    with pytest.raises(CheckpointError, match="had no order of shards"):
        ShardOrder(COUNTS, **keys).load_state_dict(None)


@pytest.mark.parametrize("name", ["lanes", "run", "block"])
def test_numbers_that_make_no_order_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} of an order of shards is at least 1, got 0"):
        ShardOrder(COUNTS, seed=0, **{name: 0})
    with pytest.raises(ConfigError, match="the 2 shards have no samples"):
        ShardOrder([0, 0], seed=0)
