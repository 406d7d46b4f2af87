"""Gradients arrive once, twice, late, sparse or never: the reduced sum is right all the same."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.utils.checkpoint import checkpoint

import drivetrain
from drivetrain.communication.process_group import Ranks
from drivetrain.contracts import Purpose
from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed


def make(module: nn.Module, **changes: Any) -> Engine:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        **changes,
    }
    engine, *_ = drivetrain.initialize(
        model=module, model_parameters=module.parameters(), config=config
    )
    return engine


def place() -> tuple[int, int]:
    ranks = Ranks.current()
    return ranks.rank, ranks.world_size


def inputs(rank: int, step: int = 0) -> torch.Tensor:
    return torch.randn(2, 4, generator=torch.Generator().manual_seed(100 * step + rank))


class Branches(nn.Module):
    """Two layers of which a call uses one, and a third that nobody uses."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.left, self.right, self.idle = nn.Linear(4, 1), nn.Linear(4, 1), nn.Linear(4, 1)

    def forward(self, x: torch.Tensor, right: bool) -> torch.Tensor:
        return (self.right(x) if right else self.left(x)).sum()


class Twice(nn.Module):
    """A layer that accumulates inside and outside a re-entrant checkpoint."""

    def __init__(self, checkpointed: bool) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.shared, self.head = nn.Linear(4, 4), nn.Linear(4, 1)
        self.checkpointed = checkpointed

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = torch.tanh(self.shared(x))
        if self.checkpointed:
            x = checkpoint(lambda y: torch.tanh(self.shared(y)), x, use_reentrant=True)
        else:
            x = torch.tanh(self.shared(x))
        return self.head(x).sum()


def mean_updated(module: nn.Module, losses: list[torch.Tensor]) -> dict[str, torch.Tensor]:
    """Parameters of ``module`` after one SGD step of length 1 on the mean of ``losses``."""
    module.zero_grad()
    (sum(losses[1:], losses[0]) / len(losses)).backward()
    return {
        name: p.detach() - (p.grad if p.grad is not None else torch.zeros_like(p))
        for name, p in module.named_parameters()
    }


def assert_same(module: nn.Module, expected: dict[str, torch.Tensor]) -> None:
    for name, parameter in module.named_parameters():
        torch.testing.assert_close(parameter.detach(), expected[name], rtol=1e-6, atol=1e-7)


# -- functions that run on every rank --------------------------------------------------------------


def ranks_take_different_branches() -> None:
    module = Branches()
    engine = make(module, data_parallel={"bucket_bytes": 16, "first_bucket_bytes": 16})
    rank, world = place()
    reference = Branches()
    losses = [reference(inputs(r), r % 2 == 1) for r in range(world)]
    expected = mean_updated(reference, losses)
    engine.backward(engine(inputs(rank), rank % 2 == 1))
    engine.step()
    assert_same(module, expected)
    engine.destroy()


def late_on_some_ranks(late_ranks: list[int], predivide: float) -> None:
    rank, world = place()
    module = Twice(checkpointed=rank in late_ranks)
    engine = make(
        module,
        data_parallel={"bucket_bytes": 16, "first_bucket_bytes": 16},
        gradient_predivide_factor=predivide,
    )
    reference = Twice(checkpointed=False)
    for step in range(3):
        losses = [reference(inputs(r, step)) for r in range(world)]
        expected = mean_updated(reference, losses)
        engine.backward(engine(inputs(rank, step)))
        engine.step()
        assert_same(module, expected)
        reference.load_state_dict(expected)
    engine.destroy()


def accumulates_without_communication() -> int:
    module = nn.Linear(4, 1)
    engine = make(module, gradient_accumulation_steps=3)
    counted = []
    for micro in range(3):
        before = engine.job.byte_log.total().payload_bytes
        engine.backward(engine(inputs(place()[0], micro)).sum())
        engine.step()
        counted.append(engine.job.byte_log.total().payload_bytes - before)
    engine.destroy()
    assert counted[:2] == [0, 0], counted
    assert counted[2] >= 5 * 4
    return counted[2]


def no_sync_defers_all_reduction() -> None:
    module, reference = nn.Linear(4, 1), nn.Linear(4, 1)
    engine = make(module)
    reference.load_state_dict(module.state_dict())
    rank, world = place()
    with engine.no_sync():
        engine.backward(engine(inputs(rank, 0)).sum())
    engine.backward(engine(inputs(rank, 1)).sum())
    engine.step()
    losses = [reference(torch.cat([inputs(r, 0), inputs(r, 1)])).sum() for r in range(world)]
    assert_same(module, mean_updated(reference, losses))
    engine.destroy()


def sums_instead_of_means() -> None:
    module, reference = nn.Linear(4, 1), nn.Linear(4, 1)
    engine = make(module, gradient_allreduce_op="sum")
    reference.load_state_dict(module.state_dict())
    rank, world = place()
    engine.backward(engine(inputs(rank)).sum())
    engine.step()
    total = torch.stack([reference(inputs(r)).sum() for r in range(world)]).sum()
    assert_same(module, mean_updated(reference, [total]))
    engine.destroy()


def groups_keep_their_own_rates() -> None:
    """Buckets of two groups, of which the second comes first in the module."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 1))
    reference = copy.deepcopy(module)
    rates = {"2": 0.5, "0": 0.125}

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        layers = dict(model.named_children())
        return [{"params": layers[name].parameters(), "lr": rate} for name, rate in rates.items()]

    engine, *_ = drivetrain.initialize(
        model=module,
        model_parameters=groups(module),
        config={
            "train_micro_batch_size_per_gpu": 2,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": 1.0, "momentum": 0.9}},
        },
    )
    plain = torch.optim.SGD(groups(reference), lr=1.0, momentum=0.9)
    rank, world = place()
    for step in range(3):
        engine.backward(engine(inputs(rank, step)).sum())
        engine.step()
        plain.zero_grad()
        sum(reference(inputs(r, step)).sum() / world for r in range(world)).backward()
        plain.step()
    assert_same(module, {name: p.detach() for name, p in reference.named_parameters()})
    engine.destroy()


def embeddings_travel_by_rows(torch_sparse: bool) -> tuple[int, int]:
    """Bytes of gradients sent with and without ``sparse_gradients``; both must train alike."""
    sent, weights = [], []
    for sparse in (True, False):
        torch.manual_seed(0)
        module = nn.Embedding(1000, 8, sparse=torch_sparse)
        engine = make(module, sparse_gradients=sparse)
        rank = place()[0]
        for step in range(2):
            rows = torch.tensor([[rank, 5, 5 + step, 999 - rank]])
            engine.backward(engine(rows).square().sum())
            engine.step()
        sent.append(engine.job.byte_log.total(purpose=Purpose.GRADIENT).payload_bytes)
        weights.append(module.weight.detach().clone())
        engine.destroy()
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-6, atol=1e-7)
    return sent[0], sent[1]


def deferred_gradients_are_taken_when_they_are_ready() -> None:
    """What a schedule with a split backward does: weight gradients come after the pass."""
    module, reference = nn.Linear(4, 1), nn.Linear(4, 1)
    engine = make(module)
    reference.load_state_dict(module.state_dict())
    rank, world = place()
    engine.states.defer([module.weight])
    engine.backward(engine(inputs(rank)).sum())
    assert module.weight.grad is not None
    module.weight.grad.mul_(2.0)
    engine.states.gradients_ready([module.weight])
    engine.step()
    expected = mean_updated(reference, [reference(inputs(r)).sum() for r in range(world)])
    doubled = reference.weight.detach() - 2 * (reference.weight.detach() - expected["weight"])
    torch.testing.assert_close(module.weight.detach(), doubled)
    engine.destroy()


def products_are_added_in_place() -> None:
    """The gradient of a second micro-batch is written to where that of the first one lies."""
    module, reference = nn.Linear(4, 1), nn.Linear(4, 1)
    engine = make(module, gradient_accumulation_steps=2)
    reference.load_state_dict(module.state_dict())
    rank, world = place()
    engine.states.defer([module.weight])
    assert engine.states.added(module.weight) is None
    engine.backward(engine(inputs(rank, 0)).sum())
    engine.states.gradients_ready([module.weight])
    engine.step()
    engine.states.defer([module.weight])
    engine.backward(engine(inputs(rank, 1)).sum())
    added, gradient = engine.states.added(module.weight), module.weight.grad
    assert added is not None
    assert gradient is not None
    added += gradient
    module.weight.grad = None
    engine.states.gradients_ready([module.weight])
    engine.step()
    both = [reference(inputs(r, step)).sum() / 2 for r in range(world) for step in range(2)]
    expected = mean_updated(reference, [a + b for a, b in zip(both[::2], both[1::2], strict=True)])
    torch.testing.assert_close(module.weight.detach(), expected["weight"])
    engine.destroy()


def starts_from_rank_zero() -> None:
    torch.manual_seed(place()[0])
    module = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4))
    module[0].bias.requires_grad_(False)
    module[1].running_mean.fill_(float(place()[0] + 1))
    engine = make(module)
    for tensor in (*module.parameters(), *module.buffers()):
        mine = tensor.detach().float()
        summed = mine.clone()
        dist.all_reduce(summed)
        torch.testing.assert_close(summed, mine * dist.get_world_size())
    assert module[1].running_mean[0] == 1.0
    engine.destroy()


def the_loss_of_one_rank_is_no_number() -> None:
    module = nn.Linear(4, 1)
    engine = make(module)
    factor = float("nan") if place()[0] == 1 else 1.0
    engine.backward(engine(inputs(0)).sum() * factor)
    engine.step()


def runs_are_repeatable() -> list[list[float]]:
    module = Twice(checkpointed=True)
    engine = make(
        module,
        gradient_clipping=0.5,
        optimizer={"type": "AdamW", "params": {"lr": 1e-2}},
        data_parallel={"bucket_bytes": 16},
    )
    for step in range(10):
        engine.backward(engine(inputs(place()[0], step)))
        engine.step()
    values = [p.detach().flatten().tolist() for p in module.parameters()]
    engine.destroy()
    return values


# -- claims ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("world", [2, 3])
def test_parameters_unused_on_some_ranks_or_all_count_as_zero(world: int) -> None:
    run_distributed(ranks_take_different_branches, world)


@pytest.mark.parametrize(
    ("late_ranks", "predivide"), [([0, 1], 1.0), ([1], 1.0), ([0], 1.0), ([1], 4.0)]
)
def test_late_accumulations_are_added_even_if_only_one_rank_has_them(
    late_ranks: list[int], predivide: float
) -> None:
    run_distributed(late_on_some_ranks, 2, late_ranks, predivide)


def test_nothing_is_sent_before_the_last_micro_batch() -> None:
    run_distributed(accumulates_without_communication, 2)


def test_no_sync_accumulates_and_the_next_backward_reduces_all() -> None:
    run_distributed(no_sync_defers_all_reduction, 2)


def test_gradient_allreduce_op_sum_does_not_divide() -> None:
    run_distributed(sums_instead_of_means, 3)


@pytest.mark.parametrize("world", [1, 2])
def test_every_group_is_updated_with_its_own_settings(world: int) -> None:
    run_distributed(groups_keep_their_own_rates, world)


@pytest.mark.parametrize("torch_sparse", [False, True])
def test_sparse_gradients_move_touched_rows_and_train_alike(torch_sparse: bool) -> None:
    for rows, whole in run_distributed(embeddings_travel_by_rows, 2, torch_sparse):
        assert rows < whole / 20


def test_deferred_gradients_are_reduced_when_they_are_reported() -> None:
    run_distributed(deferred_gradients_are_taken_when_they_are_ready, 2)
    run_distributed(products_are_added_in_place, 2)


def test_all_ranks_start_from_rank_zeros_parameters_and_buffers() -> None:
    run_distributed(starts_from_rank_zero, 3)


def test_a_loss_that_is_no_number_on_one_rank_stops_all_with_that_error() -> None:
    with pytest.raises(drivetrain.errors.DrivetrainError) as caught:
        run_distributed(the_loss_of_one_rank_is_no_number, 2)
    text = str(caught.value)
    assert "rank 1 of 2 failed first: TrainingError: the loss of step 1 is nan" in text
    assert "rank 1 failed: TrainingError" in text  # what rank 0 says


def test_two_runs_end_with_the_same_bits_on_every_rank() -> None:
    first, second = (run_distributed(runs_are_repeatable, 3) for _ in range(2))
    assert first == second
    assert first[0] == first[1] == first[2]
