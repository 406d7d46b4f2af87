"""Attention over parts of sequences is dense attention, forward and backward, in float64."""

from __future__ import annotations

from typing import Any
from unittest.mock import patch

import pytest
import torch
from torch import nn

import drivetrain
from drivetrain.contracts import Purpose, Tag
from drivetrain.engine.engine import Engine
from drivetrain.testing import run_distributed

ROWS, LENGTH, WIDTH = 2, 24, 4
PLACES = torch.arange(LENGTH)[None]
TAG = Tag(Purpose.CONTROL, site="test")


class Attend(nn.Module):
    """Attention of queries, keys and values that are parameters of the whole sequence."""

    def __init__(self, heads: int, key_heads: int, facts: dict[str, Any]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.facts = facts
        self.inputs = nn.ParameterList(
            torch.randn(ROWS, LENGTH, n, WIDTH, generator=generator, dtype=torch.float64)
            for n in (heads, key_heads, key_heads)
        )
        self.sinks = nn.Parameter(torch.randn(heads, generator=generator, dtype=torch.float64))

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor = PLACES) -> torch.Tensor:
        """Mean of products of what attention returns and ``x`` [b, s, heads * width]."""
        places = position_ids[0]
        q, k, v = (y[:, places].transpose(1, 2) for y in self.inputs)
        facts = dict(self.facts)
        if facts.pop("packed", False):
            facts["segments"] = (torch.arange(LENGTH) // 7)[None].expand(ROWS, -1)[:, places]
        if facts.pop("sinks", False):
            facts["sinks"] = self.sinks
        if (mask := facts.get("mask")) is not None:
            facts["mask"] = mask.to(q.device)
        return (drivetrain.attention(self, q, k, v, **facts).flatten(2) * x).sum((1, 2)).mean()


MASK = torch.rand(1, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(4)) < 0.7
FACTS: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"causal": True},
    "packed": {"causal": True, "packed": True},
    "window": {"causal": True, "window": 5},
    "sinks": {"causal": True, "sinks": True},
    "mask": {"mask": MASK | torch.eye(LENGTH, dtype=torch.bool)},
}

HEADS = [(8, 8), (8, 4), (8, 2), (8, 1), (4, 2), (6, 3)]


def x_of(heads: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(ROWS, LENGTH, heads * WIDTH, generator=generator, dtype=torch.float64)


def engine_of(model: nn.Module, sp: int, section: dict[str, Any]) -> Engine:
    config = {
        "train_micro_batch_size_per_gpu": ROWS,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 1.0}},
        "sequence_parallel_size": sp,
        "sequence_parallel": {"probe": False, **section},
    }
    engine, *_ = drivetrain.initialize(model=model, config=config)
    return engine


Case = tuple[int, int, str]


def gradients(sp: int, cases: list[Case], section: dict[str, Any]) -> list[list[torch.Tensor]]:
    """The loss, and what one step of rate 1 changes, for each case."""
    found = []
    for heads, key_heads, name in cases:
        model = Attend(heads, key_heads, FACTS[name])
        before = [p.detach().clone() for p in model.parameters()]
        engine = engine_of(model, sp, section)
        loss = engine(x_of(heads))
        # Of the sum over all tokens each rank has a part, and the engine averages over ranks.
        engine.backward(loss * sp)
        engine.step()
        value = loss.detach().clone()
        engine.job.communicator.all_reduce(value, "sp", TAG)
        found.append([value, *(a - b for a, b in zip(before, model.parameters(), strict=True))])
        engine.destroy()
    return found


def expected(case: Case) -> list[torch.Tensor]:
    """By the formula, in one piece."""
    heads, key_heads, name = case
    model = Attend(heads, key_heads, FACTS[name])
    loss = model(x_of(heads))
    loss.backward()
    gradients = [p.grad if p.grad is not None else torch.zeros_like(p) for p in model.parameters()]
    return [loss.detach(), *gradients]


def check(found: list[list[torch.Tensor]], cases: list[Case]) -> None:
    for tensors, case in zip(found, cases, strict=True):
        for ours, theirs in zip(tensors, expected(case), strict=True):
            torch.testing.assert_close(
                ours, theirs, rtol=1e-11, atol=1e-12, msg=lambda m, c=case: f"{c}: {m}"
            )


PAIRWISE: list[Case] = [
    *((heads, key_heads, "causal") for heads, key_heads in HEADS),
    (8, 2, "all"),
    (6, 3, "packed"),
    (8, 4, "window"),
    (4, 2, "sinks"),
    (8, 1, "mask"),
]


@pytest.mark.parametrize("sp", [1, 2, 3, pytest.param(4, marks=pytest.mark.long)])
def test_heads_in_place_of_parts_give_dense_attention(sp: int) -> None:
    for found in run_distributed(gradients, sp, sp, PAIRWISE, {}):
        check(found, PAIRWISE)


@pytest.mark.long
@pytest.mark.parametrize("sp", [2, 3, 4])
def test_every_pair_of_heads_and_masks_gives_dense_attention(sp: int) -> None:
    cases = [(*heads, name) for heads in HEADS for name in FACTS]
    for found in run_distributed(gradients, sp, sp, cases, {}):
        check(found, cases)


def without_dense_masks(sp: int, cases: list[Case]) -> list[list[torch.Tensor]]:
    with patch("drivetrain_sequence.ulysses.LARGEST_MASK", 0):
        return gradients(sp, cases, {})


def test_masks_too_large_for_a_tensor_are_asked_for_by_blocks() -> None:
    cases: list[Case] = [(6, 3, "packed"), (8, 4, "window"), (4, 2, "sinks")]
    for found in run_distributed(without_dense_masks, 2, 2, cases):
        check(found, cases)


RING: list[Case] = [case for case in PAIRWISE if case[2] not in ("sinks", "mask")]


@pytest.mark.parametrize(
    ("sp", "ring"), [(2, 2), (3, 3), (4, 2), pytest.param(4, 4, marks=pytest.mark.long)]
)
def test_rings_alone_and_around_heads_give_dense_attention(sp: int, ring: int) -> None:
    for found in run_distributed(gradients, sp, sp, RING, {"ring_size": ring}):
        check(found, RING)


def sent(ring: int) -> list[float]:
    """Elements that leave this rank in attention, forward and backward."""
    model = Attend(8, 4, FACTS["causal"])
    engine = engine_of(model, 4, {"ring_size": ring})
    found = []
    for part in ("forward", "backward"):
        before = engine.job.byte_log.total(purpose=Purpose.ACTIVATION).sent_bytes
        if part == "forward":
            loss = engine(x_of(8))
        else:
            engine.backward(loss)
        after = engine.job.byte_log.total(purpose=Purpose.ACTIVATION).sent_bytes
        found.append((after - before) / 8)
    engine.destroy()
    return found


def test_what_leaves_a_rank_is_what_the_formulas_say() -> None:
    tokens, h, h_kv, ranks = ROWS * LENGTH, 8 * WIDTH, 4 * WIDTH, 4
    exchanged = (2 * h + 2 * h_kv) * (tokens / ranks) * (ranks - 1) / ranks
    passed = 2 * tokens * h_kv * (ranks - 1) / ranks
    # In backward, keys go round again, and their gradients once more, home.
    home = 2 * tokens * h_kv
    same_batch = 4 * 3
    for forward, backward in run_distributed(sent, 4, 1):
        assert (forward - same_batch, backward) == (exchanged, exchanged)
    for forward, backward in run_distributed(sent, 4, 4):
        assert (forward - same_batch, backward) == (passed, passed + home)
