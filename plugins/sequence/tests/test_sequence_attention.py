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

ROWS, LENGTH, WIDTH, LAYERS = 2, 24, 4, 2
PLACES = torch.arange(LENGTH)[None]
TAG = Tag(Purpose.CONTROL, site="test")


class Block(nn.Module):
    """Attention to what comes from outside, with a part of what the block before has made of it."""

    def __init__(self, heads: int, facts: dict[str, Any]) -> None:
        super().__init__()
        self.facts = facts
        generator = torch.Generator().manual_seed(heads)
        self.sinks = nn.Parameter(torch.randn(heads, generator=generator, dtype=torch.float64))
        self.weight = nn.Parameter(torch.ones(heads * WIDTH, dtype=torch.float64))
        self.inner = nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        inputs: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
        places: torch.Tensor,
    ) -> torch.Tensor:
        """The like of ``x`` [b, s, heads * width]; ``inputs`` are [b, s, heads, width]."""
        query, key, value = inputs
        facts = dict(self.facts)
        if facts.pop("packed", False):
            facts["segments"] = (places // 7)[None].expand(ROWS, -1)
        if facts.pop("sinks", False):
            facts["sinks"] = self.sinks
        if facts.pop("alibi", False):
            facts["slopes"] = torch.arange(1.0, 1 + query.shape[2], dtype=torch.float64) / 8
        facts.pop("cross", None)
        query = query + x.view(query.shape) / 2
        q, k, v = (y.transpose(1, 2) for y in (query, key, value))
        return x + drivetrain.attention(self, q, k, v, **facts).flatten(2) * self.weight


class Attend(nn.Module):
    """Attention of queries, keys and values that are parameters of the whole sequence."""

    def __init__(self, heads: int, key_heads: int, facts: dict[str, Any]) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        self.cross = facts.get("cross", False)
        lengths = (LENGTH, *[2 * LENGTH if self.cross else LENGTH] * 2)
        self.inputs = nn.ParameterList(
            torch.randn(ROWS, length, n, WIDTH, generator=generator, dtype=torch.float64)
            for n, length in zip((heads, key_heads, key_heads), lengths, strict=True)
        )
        self.blocks = nn.ModuleList(Block(heads, facts) for _ in range(LAYERS))

    def forward(self, x: torch.Tensor, position_ids: torch.Tensor = PLACES) -> torch.Tensor:
        """Mean of products of what attention returns and ``x`` [b, s, heads * width]."""
        places = position_ids[0]
        of_keys = torch.stack([2 * places, 2 * places + 1], 1).flatten() if self.cross else places
        all_places = (places, of_keys, of_keys)
        inputs = tuple(y[:, i] for y, i in zip(self.inputs, all_places, strict=True))
        y = x / 4
        for block in self.blocks:
            y = block(y, inputs, places)
        return (y * x).sum((1, 2)).mean()


MASK = torch.rand(1, 1, LENGTH, LENGTH, generator=torch.Generator().manual_seed(4)) < 0.7
FACTS: dict[str, dict[str, Any]] = {
    "all": {},
    "causal": {"causal": True},
    "packed": {"causal": True, "packed": True},
    "window": {"causal": True, "window": 5},
    "sinks": {"causal": True, "sinks": True},
    "alibi": {"causal": True, "alibi": True},
    "softcap": {"causal": True, "softcap": 2.0},
    "two sides": {"window": 4, "packed": True},
    "cross": {"cross": True},
    "mask": {"mask": MASK | torch.eye(LENGTH, dtype=torch.bool)},
}
BY_BLOCKS = [name for name in FACTS if name != "mask"]
BY_CHUNKS = [name for name in BY_BLOCKS if name != "cross"]

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
    (6, 2, "alibi"),
    (4, 1, "softcap"),
    (5, 5, "two sides"),
    (8, 2, "cross"),
]


@pytest.mark.parametrize("sp", [1, 2, 3, pytest.param(4, marks=pytest.mark.long)])
def test_heads_in_place_of_parts_give_dense_attention(sp: int) -> None:
    for found in run_distributed(gradients, sp, sp, PAIRWISE, {}):
        check(found, PAIRWISE)


@pytest.mark.long
@pytest.mark.parametrize(
    ("sp", "section", "names"),
    [
        *((sp, {}, list(FACTS)) for sp in (2, 3, 4)),
        *((sp, {"ring_size": sp}, BY_BLOCKS) for sp in (2, 3, 4)),
        (4, {"ring_size": 2}, BY_BLOCKS),
        *((sp, {"chunk": chunk}, BY_CHUNKS) for sp, chunk in ((1, 5), (2, 6), (3, 9), (4, 8))),
    ],
    ids=str,
)
def test_every_pair_of_heads_and_masks_gives_dense_attention(
    sp: int, section: dict[str, Any], names: list[str]
) -> None:
    cases = [(*heads, name) for heads in HEADS for name in names]
    for found in run_distributed(gradients, sp, sp, cases, section):
        check(found, cases)


def without_dense_masks(sp: int, cases: list[Case]) -> list[list[torch.Tensor]]:
    with patch("drivetrain_sequence.ulysses.LARGEST_MASK", 0):
        return gradients(sp, cases, {})


def test_masks_too_large_for_a_tensor_are_asked_for_by_blocks() -> None:
    cases: list[Case] = [(6, 3, "packed"), (8, 4, "window"), (4, 2, "sinks")]
    for found in run_distributed(without_dense_masks, 2, 2, cases):
        check(found, cases)


RING: list[Case] = [case for case in PAIRWISE if case[2] in BY_BLOCKS]
CHUNKED: list[Case] = [case for case in PAIRWISE if case[2] in BY_CHUNKS]


@pytest.mark.parametrize(
    ("sp", "ring"), [(2, 2), (3, 3), (4, 2), pytest.param(4, 4, marks=pytest.mark.long)]
)
def test_rings_alone_and_around_heads_give_dense_attention(sp: int, ring: int) -> None:
    for found in run_distributed(gradients, sp, sp, RING, {"ring_size": ring}):
        check(found, RING)


@pytest.mark.parametrize(
    ("sp", "chunk"), [(1, 5), (2, 8), pytest.param(3, 12, marks=pytest.mark.long)]
)
def test_chunks_of_the_sequence_give_dense_attention(sp: int, chunk: int) -> None:
    for found in run_distributed(gradients, sp, sp, CHUNKED, {"chunk": chunk}):
        check(found, CHUNKED)


def key_heads(ranks: int) -> int:
    """As many as the ranks divide."""
    return 8 if ranks == 8 else 4


def sent(sp: int, section: dict[str, Any]) -> list[float]:
    """Elements that leave this rank in a layer of attention, forward and backward."""
    model = Attend(8, key_heads(sp), FACTS["causal"])
    engine = engine_of(model, sp, section)
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
    same_batch = 4 * (sp - 1)
    return [(found[0] - same_batch) / LAYERS, found[1] / LAYERS]


def formulas(ranks: int, ring: int, chunks: bool) -> list[float]:
    """What the README says, in elements."""
    heads, tokens = ranks // ring, ROWS * LENGTH
    h, h_kv = 8 * WIDTH, key_heads(ranks) * WIDTH
    exchanged = (2 * h + 2 * h_kv) * (tokens / ranks) * (heads - 1) / heads
    passed = 2 * tokens * h_kv / heads * (ring - 1) / ring
    # In backward, keys go round again, and their gradients once more, home. What is computed in
    # chunks is exchanged once more, when the chunk's forward is repeated.
    home = 2 * tokens / heads * h_kv if ring > 1 else 0
    return [exchanged + passed, exchanged * (2 if chunks else 1) + passed + home]


TRAFFIC = [
    (4, {}),
    (4, {"ring_size": 4}),
    (2, {"chunk": 8}),
    *(
        pytest.param(*case, marks=pytest.mark.long)
        for case in ((2, {}), (8, {}), (4, {"ring_size": 2}), (6, {"ring_size": 3}))
    ),
]


@pytest.mark.parametrize(("ranks", "section"), TRAFFIC, ids=str)
def test_what_leaves_a_rank_is_what_the_formulas_say(ranks: int, section: dict[str, Any]) -> None:
    expected = formulas(ranks, section.get("ring_size", 1), "chunk" in section)
    for found in run_distributed(sent, ranks, ranks, section):
        assert found == expected
