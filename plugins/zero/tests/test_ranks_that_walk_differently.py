"""Ranks whose data takes them through the model on different ways, at stage 3."""

from __future__ import annotations

import os
from importlib.util import find_spec
from unittest.mock import patch

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.testing import run_distributed
from drivetrain.testing.distributed import RanksFailedError

CONFIG = {
    "train_micro_batch_size_per_gpu": 2,
    "gradient_clipping": 0.0,
    "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
    "zero_optimization": {"stage": 3, "stage3_param_persistence_threshold": 0},
}


class Walk(nn.Module):
    """Blocks that are used in the order of a list, as often as it names them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(8, 16), nn.Tanh(), nn.Linear(16, 8)) for _ in range(4)
        )
        self.head = nn.Linear(8, 8)

    def forward(self, x: torch.Tensor, way: list[int]) -> torch.Tensor:
        for number in way:
            x = x + self.blocks[number](x)
        return self.head(x).square().mean()


def batch(rank: int, step: int) -> torch.Tensor:
    return torch.randn(2, 8, generator=torch.Generator().manual_seed(100 * step + rank))


def reference(ways: list[list[list[int]]]) -> list[float]:
    """Losses of one process that takes all ranks' ways; ``ways[step][rank]``."""
    model, losses = Walk(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for step, of_ranks in enumerate(ways):
        terms = [model(batch(rank, step), way) for rank, way in enumerate(of_ranks)]
        loss = torch.stack(terms).mean()
        optimizer.zero_grad(set_to_none=False)
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def start(*, shared: bool) -> drivetrain.Engine:
    """An engine of ranks that share memory, where drivetrain-cpu is installed, or do not."""
    without = {} if shared else {"DRIVETRAIN_DISABLE_PLUGINS": "drivetrain-cpu"}
    with patch.dict(os.environ, without):
        engine, *_ = drivetrain.initialize(model=Walk(), config=CONFIG)
    return engine


def train(ways: list[list[list[int]]], shared: bool) -> list[float]:
    engine = start(shared=shared)
    rank, losses = engine.job.rank, []
    for step, of_ranks in enumerate(ways):
        loss = engine(batch(rank, step), of_ranks[rank])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    engine.job.close()
    return losses


def assert_like_reference(ways: list[list[list[int]]], *, shared: bool = False) -> None:
    by_rank = run_distributed(train, len(ways[0]), ways, shared)
    losses = [sum(step) / len(step) for step in zip(*by_rank, strict=True)]
    assert losses == pytest.approx(reference(ways), rel=1e-5)


def test_ranks_may_drop_different_layers() -> None:
    assert_like_reference(
        [
            [[0, 1, 2, 3], [0, 2, 3], [1, 3]],
            [[3], [0, 1, 2, 3], [0]],
            [[], [2], [0, 1, 2, 3]],
        ]
    )


def test_another_order_on_all_ranks_is_learned() -> None:
    other = [3, 1, 1, 0, 2, 0]
    assert_like_reference([[other, other]] * 3 + [[[0, 1], [0, 1]], [other, other]])


def test_after_learning_ranks_may_drop_layers_of_the_new_order() -> None:
    other = [3, 1, 0, 2]
    assert_like_reference([[other, other], [[3, 2], [1, 0, 2]], [other, [0]]])


@pytest.mark.skipif(find_spec("drivetrain_cpu") is None, reason="ranks share no memory")
def test_where_ranks_share_memory_their_ways_are_their_own() -> None:
    assert_like_reference([[[0, 1, 1, 1, 2], [0, 1, 2, 3]], [[3, 0], [2, 2, 1]]], shared=True)


def test_loops_of_different_lengths_end_with_an_error_that_names_units_and_ranks() -> None:
    ways = [[[0, 1, 1, 1, 2], [0, 1, 2, 3]]]
    with pytest.raises(RanksFailedError) as caught:
        run_distributed(train, 2, ways, False)
    assert set(caught.value.errors) == {0, 1}
    for error in caught.value.errors.values():
        assert "rank 0 needs unit 'blocks.1'" in error.error
        assert "rank 1 needs" in error.error


def generate(lengths: list[int]) -> float:
    engine = start(shared=False)
    rank = engine.job.rank
    total = 0.0
    with torch.no_grad(), drivetrain.whole(engine.module):
        for token in range(lengths[rank]):
            total += float(engine.module(batch(rank, token), [0, 1, 2, 3]))
    engine.job.close()
    return total


def test_generation_loops_of_different_lengths_work_with_whole_parameters() -> None:
    lengths, model = [3, 7], Walk()
    with torch.no_grad():
        expected = [
            sum(float(model(batch(rank, t), [0, 1, 2, 3])) for t in range(length))
            for rank, length in enumerate(lengths)
        ]
    assert run_distributed(generate, 2, lengths) == pytest.approx(expected, rel=1e-5)
