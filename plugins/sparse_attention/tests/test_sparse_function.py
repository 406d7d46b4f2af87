"""Attention to listed blocks equals attention with the mask that they stand for, in float64."""

from __future__ import annotations

import pytest
import torch
from drivetrain_sparse_attention import (
    BigBirdSparsityConfig,
    Blocks,
    attend_to_blocks,
    choose_blocks,
    visible_blocks,
)
from sparse_reference import assert_same, dense, inputs, tokens_of

from drivetrain.contracts import AttentionFacts, MaskRule
from drivetrain.errors import TrainingError

BLOCK = 8


def layout(length=50, heads=4, per_head=False, causal=False):
    count = -(-length // BLOCK)
    config = BigBirdSparsityConfig(heads, BLOCK, per_head)
    seen = config.make_layout(count * BLOCK).bool()
    seen = seen.tril() if causal else seen
    return seen[None] if per_head else seen[None, :1]


def sparse(facts, seen, query, key, value):
    blocks, visible = visible_blocks(Blocks.of(seen, BLOCK), facts, query, key)
    return attend_to_blocks(query, key, value, blocks.lists, visible)[0]


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("per_head", [False, True])
@pytest.mark.parametrize(("heads", "kv_heads"), [(4, 4), (4, 2), (8, 1)])
def test_results_and_gradients_are_those_of_the_whole_mask(causal, per_head, heads, kv_heads):
    leaves = inputs(heads=heads, kv_heads=kv_heads)
    seen = layout(heads=heads, per_head=per_head, causal=causal)
    tokens = tokens_of(seen, BLOCK, 50)
    tokens = tokens.tril() if causal else tokens
    found = sparse(AttentionFacts(causal=causal), seen, *leaves)
    assert_same(found, dense(*leaves, tokens), leaves)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_other_dtypes_are_as_near_as_they_can_be(dtype):
    leaves = [x.detach().to(dtype).double().requires_grad_() for x in inputs()]
    found = sparse(AttentionFacts(), layout(), *(x.to(dtype) for x in leaves))
    bound = 1e-5 if dtype == torch.float32 else 4e-2
    assert_same(found, dense(*leaves, tokens_of(layout(), BLOCK, 50)), leaves, bound)


def random(*shape, seed=3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def test_documents_padding_windows_and_bias_hold_within_the_blocks():
    leaves, seen = inputs(), layout(causal=True)
    documents = (random(2, 50) * 4).long().sort(1)[0]
    real = random(2, 1, 1, 50, seed=4) > 0.2
    bias = random(1, 4, 50, 50, seed=5).requires_grad_()
    facts = AttentionFacts(mask=real, causal=True, window=9, segments=documents, bias=bias)
    place = torch.arange(50)
    near = (place[:, None] - place).abs() < 9
    tokens = tokens_of(seen, BLOCK, 50).tril() & near & real
    tokens = tokens & (documents[:, None, :, None] == documents[:, None, None, :])
    wanted = dense(*leaves, tokens, bias=bias).nan_to_num()
    assert_same(sparse(facts, seen, *leaves), wanted, [*leaves, bias])


def test_a_bias_of_all_samples_and_heads_gets_the_sum_of_their_gradients():
    leaves, seen = inputs(), layout()
    bias = random(50, 50).requires_grad_()
    found = sparse(AttentionFacts(bias=bias[None, None]), seen, *leaves)
    tokens = tokens_of(seen, BLOCK, 50)
    assert_same(found, dense(*leaves, tokens, bias=bias), [*leaves, bias])


def test_slopes_of_heads_count_places():
    leaves, seen = inputs(), layout(causal=True)
    slopes = torch.tensor([0.5, 0.25, 0.1, 0.0], dtype=torch.float64).requires_grad_()
    place = torch.arange(50)
    bias = (place[:, None] - place).abs() * -slopes[:, None, None]
    tokens = tokens_of(seen, BLOCK, 50).tril()
    found = sparse(AttentionFacts(causal=True, slopes=slopes), seen, *leaves)
    assert_same(found, dense(*leaves, tokens, bias=bias), [*leaves, slopes])


def test_a_mask_that_is_a_function_of_indices_is_asked_about_listed_blocks_alone():
    asked = []

    def allowed(sample, head, query, key):
        asked.append(torch.broadcast_shapes(sample.shape, head.shape, query.shape, key.shape))
        return (query + key + sample) % 3 > 0

    def build():
        raise AssertionError("nobody may need the whole mask")

    leaves, seen = inputs(), layout()
    found = sparse(AttentionFacts(mask=MaskRule(allowed, build)), seen, *leaves)
    entries = int(seen.sum())
    assert asked == [(2, entries, BLOCK, BLOCK)]
    sample, place = torch.arange(2)[:, None, None, None], torch.arange(50)
    rule = (place[:, None] + place + sample) % 3 > 0
    assert_same(found, dense(*leaves, tokens_of(seen, BLOCK, 50) & rule), leaves)


def test_the_logarithm_of_sums_has_a_gradient_too():
    leaves, seen = inputs(heads=2, kv_heads=2), layout(heads=2)
    blocks, visible = visible_blocks(Blocks.of(seen, BLOCK), AttentionFacts(), *leaves[:2])
    _, lse = attend_to_blocks(*leaves, blocks.lists, visible)
    query, key, _ = leaves
    scores = query @ key.transpose(2, 3) / 4
    wanted = scores.masked_fill(~tokens_of(seen, BLOCK, 50), -torch.inf).logsumexp(-1)
    torch.testing.assert_close(lse, wanted)
    weight = random(*lse.shape)
    for one, other in zip(
        torch.autograd.grad(lse, [query, key], weight),
        torch.autograd.grad(wanted, [query, key], weight),
        strict=True,
    ):
        torch.testing.assert_close(one, other)


def test_second_derivatives_are_refused():
    leaves = inputs()
    found = sparse(AttentionFacts(), layout(), *leaves)
    (gradient,) = torch.autograd.grad(found.square().sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def test_an_empty_row_is_refused_with_its_place():
    seen = layout(per_head=True).clone()
    seen[0, 2, 3] = False
    with pytest.raises(TrainingError, match=r"head 2 has an empty row: queries of block 3"):
        Blocks.of(seen, BLOCK)


@pytest.mark.parametrize("shape", [(2, 1, 50, 49), (50, 3), (1, 1, 1, 1, 1)])
def test_a_mask_of_another_shape_is_refused(shape):
    query, key, value = inputs()
    facts = AttentionFacts(mask=torch.zeros(shape, dtype=torch.float64))
    with pytest.raises(TrainingError, match=r"does not broadcast|shape"):
        sparse(facts, layout(), query, key, value)


# -- blocks chosen by what they hold ---------------------------------------------------------------


@pytest.mark.parametrize("causal", [False, True])
def test_the_chosen_blocks_are_those_whose_mean_keys_score_highest(causal):
    query, key, _ = (x.detach() for x in inputs(batch=1, heads=2, kv_heads=1, length=64))
    chosen = choose_blocks(query, key, block=BLOCK, count=3, causal=causal)
    for row in range(8):
        mean = query[0, :, row * BLOCK : (row + 1) * BLOCK].mean(1).sum(0)
        scores = torch.stack(
            [mean @ key[0, 0, j * BLOCK : (j + 1) * BLOCK].mean(0) for j in range(8)]
        )
        able = range(row + 1) if causal else range(8)
        best = sorted(able, key=lambda j: (j not in (0, row), -float(scores[j])))[:3]
        assert set(chosen[0, 0, row].nonzero().flatten().tolist()) == set(best), row
        assert torch.equal(chosen[0, 0], chosen[0, 1])


def test_chosen_blocks_stay_within_documents():
    query, key, _ = inputs(batch=2, length=64)
    documents = torch.tensor([[0] * 20 + [1] * 44, [0] * 64]).int()
    padded = documents.clone()
    padded[1, 40:] = -1
    chosen = choose_blocks(
        query, key, block=BLOCK, count=4, causal=False, of_queries=documents, of_keys=padded
    )
    # The first document ends in block 2; the second row's keys end with block 4.
    assert not bool(chosen[0, :, :2, 3:].any())
    assert not bool(chosen[0, :, 3:, :2].any())
    off = ~torch.eye(8, dtype=torch.bool)
    assert not bool((chosen[1] & off)[:, :, 5:].any())


def test_all_blocks_chosen_are_dense_attention():
    leaves = inputs(length=50)
    chosen = choose_blocks(*leaves[:2], block=BLOCK, count=99, causal=True)
    found = sparse(AttentionFacts(causal=True), chosen, *leaves)
    tokens = torch.ones(50, 50, dtype=torch.bool).tril()
    assert_same(found, dense(*leaves, tokens), leaves)


def test_gradients_flow_through_chosen_blocks():
    leaves = inputs(length=50)
    chosen = choose_blocks(*leaves[:2], block=BLOCK, count=2, causal=True)
    assert int(chosen.sum(3).max()) == 2
    found = sparse(AttentionFacts(causal=True), chosen, *leaves)
    wanted = dense(*leaves, tokens_of(chosen, BLOCK, 50).tril())
    assert_same(found, wanted, leaves)
