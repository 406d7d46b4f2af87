"""FlexAttention is given what the listed blocks are, and is asked where it serves."""

from __future__ import annotations

import pytest
import torch
from drivetrain_sparse_attention import (
    BigBirdSparsityConfig,
    Blocks,
    attend_to_blocks,
    visible_blocks,
)
from drivetrain_sparse_attention.flex import attend_by_flex, flex_mask, serves

from drivetrain.contracts import AttentionFacts

BLOCK, LENGTH = 8, 50


def seen_by(heads: int, causal: bool, per_head: bool) -> torch.Tensor:
    config = BigBirdSparsityConfig(heads, BLOCK, per_head)
    seen = config.make_layout(-(-LENGTH // BLOCK) * BLOCK).bool()
    seen = seen.tril() if causal else seen
    return seen[None] if per_head else seen[None, :1]


def tensors(heads: int, kv_heads: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    shapes = [(2, n, LENGTH, 16) for n in (heads, kv_heads, kv_heads)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("told", ["plain", "documents"])
@pytest.mark.parametrize(("causal", "per_head"), [(False, True), (True, False)])
def test_results_are_those_of_listed_blocks(causal: bool, per_head: bool, told: str) -> None:
    query, key, value = tensors(4, 2)
    facts = AttentionFacts(causal=causal)
    if told == "documents":
        real = torch.ones(2, 1, 1, LENGTH, dtype=torch.bool)
        real[0, ..., -5:] = False
        documents = torch.arange(LENGTH)[None].expand(2, -1) // 20
        facts = AttentionFacts(mask=real, causal=causal, segments=documents)
    blocks, visible = visible_blocks(
        Blocks.of(seen_by(4, causal, per_head), BLOCK), facts, query, key
    )
    expected, wanted = attend_to_blocks(query, key, value, blocks.lists, visible)
    found, lse = attend_by_flex(query, key, value, blocks, visible)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(lse.to(wanted.dtype), wanted)


@pytest.mark.parametrize("causal", [False, True])
def test_lists_name_the_blocks_of_the_layout_and_no_others(causal: bool) -> None:
    seen = seen_by(4, causal, per_head=True)
    query, key, _ = tensors(4, 4)
    blocks, visible = visible_blocks(
        Blocks.of(seen, BLOCK), AttentionFacts(causal=causal), query, key
    )
    mask = flex_mask(blocks, visible, (LENGTH, LENGTH))
    assert torch.equal(mask.to_dense().bool(), seen)
    # What is seen whole is computed without a look at the mask.
    whole = int(mask.full_kv_num_blocks.sum())
    assert whole == int((seen.tril(-1) if causal else seen).sum())


def test_it_is_asked_where_it_serves_alone() -> None:
    query = torch.empty(1, 2, 256, 64, dtype=torch.bfloat16)
    seen = torch.ones(1, 1, 2, 2, dtype=torch.bool)
    facts = AttentionFacts(causal=True)
    _, visible = visible_blocks(Blocks.of(seen, 128), facts, query, query)
    assert serves(query, query, visible, (8, 0))
    assert not serves(query, query, visible, None)
    assert not serves(query, query, visible, (7, 5))
    assert not serves(query, query, visible._replace(block=64), (9, 0))
    assert not serves(query, query, visible._replace(bias=query), (9, 0))
    assert not serves(query.double(), query.double(), visible, (9, 0))
    assert not serves(query[..., :8], query, visible, (9, 0))
