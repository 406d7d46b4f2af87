"""Layouts follow their rules, which stand here as one question for each pair of blocks."""

from __future__ import annotations

import pytest
import torch
from drivetrain_sparse_attention import (
    BigBirdSparsityConfig,
    BSLongformerSparsityConfig,
    DenseSparsityConfig,
    FixedSparsityConfig,
    LocalSlidingWindowSparsityConfig,
    SparsityConfig,
    VariableSparsityConfig,
)

BLOCK, HEADS = 16, 4
BOTH = ("bidirectional", "unidirectional")


def made(config, blocks):
    layout = config.make_layout(blocks * BLOCK)
    assert layout.dtype == torch.int64
    assert layout.shape == (config.num_heads, blocks, blocks)
    return layout


def by_rule(blocks, rule):
    return torch.tensor([[int(bool(rule(i, j))) for j in range(blocks)] for i in range(blocks)])


def test_dense_is_all_ones():
    assert bool(made(DenseSparsityConfig(2, BLOCK), 5).all())


@pytest.mark.parametrize("attention", BOTH)
@pytest.mark.parametrize("blocks", [8, 10, 7])
@pytest.mark.parametrize(("local", "size"), [(4, 1), (4, 2)])
def test_fixed_has_windows_and_the_global_blocks_of_each(attention, blocks, local, size):
    patterns = local // size
    config = FixedSparsityConfig(
        HEADS, BLOCK, True, local, size, attention, num_different_global_patterns=patterns
    )
    layout, ahead = made(config, blocks), attention == "bidirectional"
    for head in range(HEADS):
        first = local - (1 + head % patterns) * size
        starts = [w * local + first for w in range(blocks // local)]
        if blocks % local:
            starts.append(min(blocks // local * local + first, blocks - size))

        def rule(i, j, starts=starts):
            near = i // local == j // local and (ahead or j <= i)
            return near or any(s <= j < s + size and (ahead or i >= s) for s in starts)

        assert torch.equal(layout[head], by_rule(blocks, rule)), head


def test_horizontal_global_blocks_see_all():
    layout = made(FixedSparsityConfig(1, BLOCK, horizontal_global_attention=True), 8)[0]
    wanted = by_rule(8, lambda i, j: i // 4 == j // 4 or i % 4 == 3 or j % 4 == 3)
    assert torch.equal(layout, wanted)


@pytest.mark.parametrize("attention", BOTH)
def test_variable_has_windows_of_its_sizes_and_global_ranges(attention):
    config = VariableSparsityConfig(
        HEADS,
        BLOCK,
        local_window_blocks=[1, 3, 2],
        global_block_indices=[1, 6],
        global_block_end_indices=[3, 40],
        attention=attention,
    )
    window = [0, 1, 1, 1, 2, 2, 3, 3, 4]
    ahead = attention == "bidirectional"

    def rule(i, j):
        near = window[i] == window[j] and (ahead or j <= i)
        ranges = [(1, 3), (6, 9)]
        return near or any(s <= j < e and (ahead or i >= s) for s, e in ranges)

    assert torch.equal(made(config, 9)[2], by_rule(9, rule))


def test_variable_adds_random_blocks_to_every_row():
    plain = made(VariableSparsityConfig(1, BLOCK), 12)
    random = made(VariableSparsityConfig(1, BLOCK, num_random_blocks=3), 12)
    assert bool((random >= plain).all())
    assert int((random - plain).sum()) > 12


@pytest.mark.parametrize("attention", BOTH)
def test_bigbird_is_a_band_with_first_blocks_and_random_ones(attention):
    config = BigBirdSparsityConfig(HEADS, BLOCK, True, 2, 3, 2, attention, seed=5)
    layout, ahead = made(config, 12), attention == "bidirectional"
    sure = by_rule(12, lambda i, j: (abs(i - j) <= 1 or i < 2 or j < 2) and (ahead or j <= i))
    assert bool((layout >= sure).all())
    assert int((layout - sure).sum(2).max()) <= 2
    assert ahead or not bool(layout.triu(1).any())
    assert not torch.equal(layout[0], layout[1])
    assert torch.equal(layout, made(config, 12))
    other = BigBirdSparsityConfig(HEADS, BLOCK, True, 2, 3, 2, attention, seed=6)
    assert not torch.equal(layout, made(other, 12))


@pytest.mark.parametrize("attention", BOTH)
def test_bslongformer_is_a_band_with_global_blocks(attention):
    config = BSLongformerSparsityConfig(
        HEADS, BLOCK, num_sliding_window_blocks=5, global_block_indices=[0, 7], attention=attention
    )
    ahead = attention == "bidirectional"
    wanted = by_rule(
        9,
        lambda i, j: (abs(i - j) <= 2 or {i, j} & {0, 7}) and (ahead or j <= i),
    )
    assert torch.equal(made(config, 9)[3], wanted)


@pytest.mark.parametrize("attention", BOTH)
def test_local_is_a_band(attention):
    config = LocalSlidingWindowSparsityConfig(HEADS, BLOCK, 5, attention)
    ahead = attention == "bidirectional"
    wanted = by_rule(9, lambda i, j: abs(i - j) <= 2 and (ahead or j <= i))
    assert torch.equal(made(config, 9)[0], wanted)
    assert LocalSlidingWindowSparsityConfig(HEADS).attention == "unidirectional"


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: FixedSparsityConfig(1, num_local_blocks=4, num_global_blocks=3), ValueError, "3"),
        (lambda: FixedSparsityConfig(1, attention="both"), NotImplementedError, "'both'"),
        (
            lambda: FixedSparsityConfig(
                1, attention="unidirectional", horizontal_global_attention=True
            ),
            ValueError,
            "bidirectional",
        ),
        (
            lambda: FixedSparsityConfig(4, num_different_global_patterns=2),
            ValueError,
            "different_layout_per_head",
        ),
        (
            lambda: FixedSparsityConfig(
                8, different_layout_per_head=True, num_different_global_patterns=5
            ),
            ValueError,
            "more than the 4 places",
        ),
        (
            lambda: VariableSparsityConfig(
                1, global_block_indices=[3], global_block_end_indices=[3]
            ),
            ValueError,
            "not below",
        ),
        (
            lambda: BSLongformerSparsityConfig(1, global_block_end_indices=[3, 4]),
            ValueError,
            "have 2",
        ),
        (lambda: BigBirdSparsityConfig(1).make_layout(40), ValueError, "does not divide"),
        (lambda: BigBirdSparsityConfig(1).make_layout(32), ValueError, "at least 3 blocks"),
        (lambda: SparsityConfig(1).make_layout(32), NotImplementedError, "says no layout"),
    ],
)
def test_what_cannot_be_is_refused(make, error, message):
    with pytest.raises(error, match=message):
        make()
