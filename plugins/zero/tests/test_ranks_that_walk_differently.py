"""Ranks whose data takes them through the model on different ways, where units are gathered."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import drivetrain
from drivetrain.testing import run_distributed
from drivetrain.testing.distributed import RanksFailedError

BASE = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
}
GATHERS: dict[str, dict[str, Any]] = {
    "in turn": {"stage": 3, "stage3_param_persistence_threshold": 0},
    "ahead": {"stage": 3, "stage3_param_persistence_threshold": 0, "overlap_comm": True},
    "one ahead": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_prefetch_bucket_size": 300,
        "overlap_comm": True,
    },
    "kept for reuse": {
        "stage": 3,
        "stage3_param_persistence_threshold": 0,
        "stage3_max_reuse_distance": 10**9,
        "overlap_comm": True,
    },
    "until the update": {"stage": 2, "overlap_param_gather": True, "overlap_comm": True},
}
each_way_to_gather = pytest.mark.parametrize("zero", GATHERS.values(), ids=GATHERS)


class Walk(nn.Module):
    """Blocks that are used in the order of a list, as often as it names them.

    A negative number uses the weights of a block outside of it: -1 those of the first.
    """

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(4)
        )
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, way: list[int]) -> torch.Tensor:
        for number in way:
            if number >= 0:
                x = x + self.blocks[number](x)
            else:
                first, _, last = self.blocks[-number - 1]
                x = x + F.linear(F.linear(x, first.weight), last.weight)
        return self.head(x).square().mean()


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(100 * step + rank))


def reference(ways: list[list[list[int]]], accumulation: int) -> list[float]:
    """Losses of one process that takes all ranks' ways; ``ways[micro-batch][rank]``."""
    model, losses = Walk(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for number, of_ranks in enumerate(ways):
        if number % accumulation == 0:
            optimizer.zero_grad(set_to_none=False)
        terms = [model(batch(rank, number), way) for rank, way in enumerate(of_ranks)]
        loss = torch.stack(terms).mean()
        (loss / accumulation).backward()
        if (number + 1) % accumulation == 0:
            optimizer.step()
        losses.append(loss.item())
    return losses


def start(
    zero: dict[str, Any], *, accumulation: int = 1, shared: bool = False
) -> drivetrain.Engine:
    """An engine of ranks that share memory, where drivetrain-cpu is installed, or do not."""
    without = {} if shared else {"DRIVETRAIN_DISABLE_PLUGINS": "drivetrain-cpu"}
    config = {**BASE, "zero_optimization": zero, "gradient_accumulation_steps": accumulation}
    with patch.dict(os.environ, without):
        engine, *_ = drivetrain.initialize(model=Walk(), config=config)
    return engine


def train(
    ways: list[list[list[int]]], zero: dict[str, Any], accumulation: int, shared: bool, looks: bool
) -> list[float]:
    """Losses; ``looks`` evaluates the model on the same way between forward and backward."""
    engine = start(zero, accumulation=accumulation, shared=shared)
    rank, losses = engine.job.rank, []
    for step, of_ranks in enumerate(ways):
        loss = engine(batch(rank, step), of_ranks[rank])
        if looks:
            with torch.no_grad():
                assert torch.equal(engine(batch(rank, step), of_ranks[rank]), loss)
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.job.close()
    return losses


def assert_like_reference(
    ways: list[list[list[int]]],
    zero: dict[str, Any],
    *,
    accumulation: int = 1,
    shared: bool = False,
    looks: bool = False,
) -> None:
    by_rank = run_distributed(train, len(ways[0]), ways, zero, accumulation, shared, looks)
    losses = [sum(step) / len(step) for step in zip(*by_rank, strict=True)]
    assert losses == pytest.approx(reference(ways, accumulation), rel=1e-5)


def in_turns(ways: list[list[list[int]]]) -> list[list[list[int]]]:
    """Two micro-batches for each: in the second one ranks swap their ways."""
    return [turn for of_ranks in ways for turn in (of_ranks, of_ranks[::-1])]


@each_way_to_gather
def test_ranks_may_drop_different_layers(zero: dict[str, Any]) -> None:
    ways = [
        [[0, 1, 2, 3], [0, 2, 3], [1, 3]],
        [[3], [0, 1, 2, 3], [0]],
        [[], [2], [0, 1, 2, 3]],
    ]
    assert_like_reference(ways, zero)
    assert_like_reference(ways, zero, looks=True)
    assert_like_reference(in_turns(ways), zero, accumulation=2)


@each_way_to_gather
def test_another_order_on_all_ranks_is_learned(zero: dict[str, Any]) -> None:
    other = [3, 1, 1, 0, 2, 0]
    ways = [[other, other]] * 3 + [[[0, 1], [0, 1]], [other, other]]
    assert_like_reference(ways, zero)
    assert_like_reference([*ways, [[0, 1], [0, 1]]], zero, accumulation=2)


@each_way_to_gather
def test_after_learning_ranks_may_drop_layers_of_the_new_order(zero: dict[str, Any]) -> None:
    other = [3, 1, 0, 2]
    assert_like_reference([[other, other], [[3, 2], [1, 0, 2]], [other, [0]]], zero)


@each_way_to_gather
def test_ranks_may_drop_different_uses_of_a_layer_that_comes_again(zero: dict[str, Any]) -> None:
    other = [0, 1, 2, 1, 3, 2]
    ways = [[other, other], [other, other], [[0, 1, 3, 2], [2, 1]], [[1, 2, 1], other], [[2], [3]]]
    assert_like_reference(ways, zero)
    assert_like_reference(ways, zero, looks=True)
    assert_like_reference(in_turns(ways), zero, accumulation=2)


@each_way_to_gather
def test_ranks_may_use_weights_of_different_layers_outside_of_them(zero: dict[str, Any]) -> None:
    usual = [0, 1, 2, 3]
    ways = [
        [[0, -2, 2, 3], usual],
        [usual, [-1, -2, 3]],
        [[-2, 1, 2], [0, 3]],
        [[0, 1, 2, -4], [-4]],
    ]
    assert_like_reference(ways, zero)
    assert_like_reference(ways, zero, looks=True)
    assert_like_reference(in_turns(ways), zero, accumulation=2)


@each_way_to_gather
def test_weights_of_the_last_layer_may_be_used_again_outside_of_it(zero: dict[str, Any]) -> None:
    way = [0, 1, 2, 3, -4]
    assert_like_reference([[way, way]] * 3, zero, looks=True)


OUTSIDE = [0, -2, 2, 3, -4]


def forwards_before_backwards(zero: dict[str, Any], ways: list[list[int]]) -> list[float]:
    """Two graphs wait for their backward at once, and the first backward ends before the second."""
    engine, losses = start(zero, accumulation=2), []
    for step in range(3):
        way = ways[engine.job.rank]
        pair = [engine(batch(engine.job.rank, 2 * step + i), way) for i in range(2)]
        for loss in pair:
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    engine.job.close()
    return losses


def backwards_of_one_forward(zero: dict[str, Any]) -> list[float]:
    engine, losses = start(zero, accumulation=2), []
    for step in range(3):
        loss = engine(batch(engine.job.rank, step), OUTSIDE)
        for again in (True, False):
            engine.backward(loss, retain_graph=again)
            engine.step()
        losses.append(loss.item())
    engine.job.close()
    return losses


@each_way_to_gather
@pytest.mark.parametrize("ways", [[OUTSIDE, OUTSIDE], [[0, 2, 3], [1, 3]]], ids=str)
def test_several_graphs_may_wait_for_their_backward(
    zero: dict[str, Any], ways: list[list[int]]
) -> None:
    by_rank = run_distributed(forwards_before_backwards, 2, zero, ways)
    losses = [sum(step) / 2 for step in zip(*by_rank, strict=True)]
    assert losses == pytest.approx(reference([ways] * 6, 2), rel=1e-5)


@each_way_to_gather
def test_a_graph_may_be_gone_through_again(zero: dict[str, Any]) -> None:
    by_rank = run_distributed(backwards_of_one_forward, 2, zero)
    losses = [sum(step) / 2 for step in zip(*by_rank, strict=True)]
    assert losses == pytest.approx(reference([[OUTSIDE, OUTSIDE]] * 3, 1), rel=1e-5)


@pytest.mark.skipif(find_spec("drivetrain_cpu") is None, reason="ranks share no memory")
@each_way_to_gather
def test_where_ranks_share_memory_their_ways_are_their_own(zero: dict[str, Any]) -> None:
    ways = [[[0, 1, 1, 1, 2], [0, 1, 2, 3]], [[3, 0], [2, 2, 1]]]
    assert_like_reference(ways, zero, shared=True)


@pytest.mark.parametrize("zero", [GATHERS["in turn"], GATHERS["ahead"]], ids=["in turn", "ahead"])
def test_loops_of_different_lengths_end_with_an_error_that_names_units_and_ranks(
    zero: dict[str, Any],
) -> None:
    ways = [[[0, 1, 1, 1, 2], [0, 1, 2, 3]]]
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(train, 2, ways, zero, 1, False, False)
    assert set(caught.value.errors) == {0, 1}
    for error in caught.value.errors.values():
        assert "rank 0 needs unit 'blocks.1'" in error.error
        assert "rank 1 needs" in error.error


def generate(lengths: list[int], zero: dict[str, Any]) -> float:
    engine = start(zero)
    rank = engine.job.rank
    total = 0.0
    with torch.no_grad(), drivetrain.whole(engine.module):
        for token in range(lengths[rank]):
            total += float(engine.module(batch(rank, token), [0, 1, 2, 3]))
    engine.job.close()
    return total


@each_way_to_gather
def test_generation_loops_of_different_lengths_work_with_whole_parameters(
    zero: dict[str, Any],
) -> None:
    lengths, model = [3, 7], Walk()
    with torch.no_grad():
        expected = [
            sum(float(model(batch(rank, t), [0, 1, 2, 3])) for t in range(length))
            for rank, length in enumerate(lengths)
        ]
    assert run_distributed(generate, 2, lengths, zero) == pytest.approx(expected, rel=1e-5)
