"""Layers and helpers for scripts: self-attention, BERT's layer, padding, block products."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from drivetrain_sparse_attention import (
    BertSparseSelfAttention,
    BigBirdSparsityConfig,
    FixedSparsityConfig,
    MatMul,
    Softmax,
    SparseAttentionUtils,
    SparseSelfAttention,
)
from sparse_models import tiny
from sparse_reference import assert_same, dense, inputs, tokens_of
from torch import nn


def layer(**options):
    config = FixedSparsityConfig(4, 8, num_local_blocks=2)
    return SparseSelfAttention(config, max_seq_length=64, **options), config


def random(*shape, seed=3):
    return torch.rand(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@pytest.mark.parametrize("length", [64, 41])
def test_a_layer_attends_as_its_masks_and_its_layout_say(length):
    module, config = layer()
    leaves = inputs(heads=4, kv_heads=4, length=length)
    rpe = random(1, 4, length, length).requires_grad_()
    padding = torch.zeros(2, length, dtype=torch.float64)
    padding[0, :3] = -10000.0
    shown = (random(length, length, seed=4) > 0.3) | torch.eye(length, dtype=torch.bool)
    found = module(*leaves, rpe=rpe, key_padding_mask=padding, attn_mask=shown.double())
    seen = tokens_of(config.make_layout(64), 8, length)[None] & shown
    wanted = dense(*leaves, seen, bias=rpe + padding[:, None, None])
    assert_same(found, wanted, [*leaves, rpe])


def test_modes_of_masks_turn_round():
    module, config = layer(key_padding_mask_mode="mul", attn_mask_mode="add")
    leaves = inputs(heads=4, kv_heads=4, length=32)
    real = torch.ones(2, 32)
    real[1, 20:] = 0
    added = random(32, 32)
    found = module(*leaves, key_padding_mask=real, attn_mask=added)
    seen = tokens_of(config.make_layout(32), 8, 32)[None] & real.bool()[:, None, None]
    assert_same(found, dense(*leaves, seen, bias=added).nan_to_num(), leaves)


def test_a_layer_keeps_its_layout_in_checkpoints():
    module, config = layer()
    assert torch.equal(module.state_dict()["master_layout"], config.make_layout(64))


def test_what_a_layer_cannot_do_is_refused():
    module, _ = layer()
    query, key, value = inputs(heads=4, kv_heads=4, length=65)
    with pytest.raises(ValueError, match="longer than max_seq_length, 64"):
        module(query, key, value)
    with pytest.raises(ValueError, match="only self-attention"):
        module(query[:, :, :8], key, value)
    with pytest.raises(ValueError, match="2 heads, but the sparsity config is of 4"):
        module(*(x[:, :2, :8] for x in (query, key, value)))
    with pytest.raises(ValueError, match=r"expected 'add' or 'mul'"):
        layer(attn_mask_mode="and")


def test_a_pretrained_model_becomes_sparse_and_keeps_its_weights():
    model = tiny("bert", max_position_embeddings=16)
    tokens = torch.randint(1, 40, (2, 48), generator=torch.Generator().manual_seed(0))
    before = model.state_dict()
    model = SparseAttentionUtils.extend_position_embedding(model, 48)
    table = model.bert.embeddings.position_embeddings.weight
    old = before["bert.embeddings.position_embeddings.weight"]
    torch.testing.assert_close(table, torch.cat([old] * 3))
    config = BigBirdSparsityConfig(4, 8)
    real = torch.ones(2, 48, dtype=torch.int64)
    real[0, 40:] = 0
    seen = tokens_of(config.make_layout(48), 8, 48)[None] & real.bool()[:, None, None]
    wanted = model(tokens, attention_mask=seen).logits
    SparseAttentionUtils.replace_model_self_attention_with_sparse_self_attention(model, 48, config)
    found = model(tokens, attention_mask=real).logits
    torch.testing.assert_close(found[real.bool()], wanted[real.bool()])
    names = {n for n in before if "position_ids" not in n}
    assert names <= {*model.state_dict(), "bert.embeddings.position_ids"}


def test_positions_of_roberta_keep_the_two_that_no_token_has():
    weight = torch.arange(10.0)[:, None].repeat(1, 3)
    embeddings = nn.Module()
    embeddings.position_embeddings = nn.Embedding.from_pretrained(weight, padding_idx=1)
    embeddings.position_ids = torch.arange(10)[None]
    model = SimpleNamespace(
        embeddings=embeddings,
        config=SimpleNamespace(model_type="roberta", max_position_embeddings=10),
    )
    SparseAttentionUtils.extend_position_embedding(model, 20)
    table = embeddings.position_embeddings.weight[:, 0].tolist()
    assert table == [0, 1, *range(2, 10), *range(2, 10), *range(2, 6)]
    assert model.config.max_position_embeddings == 22
    assert embeddings.position_ids.shape == (1, 22)


def test_models_that_cannot_be_changed_are_refused():
    with pytest.raises(ValueError, match="has no table of learned positions"):
        SparseAttentionUtils.extend_position_embedding(tiny("llama"), 64)
    with pytest.raises(ValueError, match="more than 8"):
        SparseAttentionUtils.extend_position_embedding(tiny("bert"), 8)
    replace = SparseAttentionUtils.replace_model_self_attention_with_sparse_self_attention
    with pytest.raises(ValueError, match="has no encoder of BERT's kind"):
        replace(tiny("llama"), 64)
    with pytest.raises(ValueError, match="the sparsity config is of 3"):
        BertSparseSelfAttention(tiny("bert").config, FixedSparsityConfig(3))


def test_a_tokenizer_learns_the_length():
    tokenizer = SimpleNamespace(model_max_length=512, init_kwargs={})
    SparseAttentionUtils.update_tokenizer_model_max_length(tokenizer, 4096)
    assert (tokenizer.model_max_length, tokenizer.init_kwargs) == (
        4096,
        {"model_max_length": 4096},
    )


def test_inputs_are_padded_to_whole_blocks_and_results_cut_again():
    tokens, kinds = torch.ones(2, 13, dtype=torch.int64), torch.zeros(2, 13, dtype=torch.int64)
    pad = SparseAttentionUtils.pad_to_block_size
    added, padded, mask, types, positions, embedded = pad(
        8, tokens, None, kinds, None, None, 7, None
    )
    assert added == 3
    assert padded[0, 13:].tolist() == [7, 7, 7]
    assert mask[1].tolist() == [1] * 13 + [0] * 3
    assert types.shape == (2, 16)
    assert positions is embedded is None
    embed = nn.Embedding(9, 4)
    added, *_, embedded = pad(8, None, mask[:, :13], None, None, embed(tokens), 7, embed)
    torch.testing.assert_close(embedded[:, 13:], embed(torch.full((2, 3), 7)))
    assert SparseAttentionUtils.unpad_sequence_output(added, embedded).shape == (2, 13, 4)
    assert pad(13, tokens, None, None, None, None, 0, None)[:2] == (0, tokens)
    with pytest.raises(ValueError, match="neither input_ids nor inputs_embeds"):
        pad(8, None, None, None, None, None, 0, None)


# -- products of blocks ----------------------------------------------------------------------------

BLOCK = 4


def blocks_of(x, layout):
    head, row, column = layout.nonzero(as_tuple=True)
    tiles = x.unflatten(3, (-1, BLOCK)).unflatten(2, (-1, BLOCK)).transpose(3, 4)
    return tiles[:, head, row, column]


def random_layout(rows, columns):
    return (random(2, rows, columns, seed=9) > 0.5).long()


@pytest.mark.parametrize("mode", ["sdd", "dsd", "dds"])
@pytest.mark.parametrize("trans_a", [False, True])
@pytest.mark.parametrize("trans_b", [False, True])
def test_products_are_those_of_whole_matrices(mode, trans_a, trans_b):
    sizes = {"m": 3, "k": 4, "n": 5}
    of_a = ("k", "m") if trans_a else ("m", "k")
    of_b = ("n", "k") if trans_b else ("k", "n")
    of_layout = {"sdd": ("m", "n"), "dsd": of_a, "dds": of_b}[mode]
    layout = random_layout(*(sizes[x] for x in of_layout))
    exists = tokens_of(layout, BLOCK, 99)
    a = random(2, 2, *(sizes[x] * BLOCK for x in of_a)).requires_grad_()
    b = random(2, 2, *(sizes[x] * BLOCK for x in of_b), seed=4).requires_grad_()
    left = blocks_of(a, layout) if mode == "dsd" else a
    right = blocks_of(b, layout) if mode == "dds" else b
    found = MatMul(layout, BLOCK, mode, trans_a, trans_b)(left, right)
    whole_a = a * exists if mode == "dsd" else a
    whole_b = b * exists if mode == "dds" else b
    whole_a = whole_a.transpose(2, 3) if trans_a else whole_a
    whole_b = whole_b.transpose(2, 3) if trans_b else whole_b
    wanted = whole_a @ whole_b
    assert_same(found, blocks_of(wanted, layout) if mode == "sdd" else wanted, [a, b])


def test_softmax_is_over_the_existing_elements_of_rows():
    layout = random_layout(3, 4)
    layout[0, 1] = 0  # a row of nothing
    exists = tokens_of(layout, BLOCK, 99)
    x = random(2, 2, 12, 16).requires_grad_()
    rpe, padding, shown = random(2, 12, 16, seed=5), random(2, 16, seed=6), random(12, 16) > 0.2
    found = Softmax(layout, BLOCK)(
        blocks_of(x, layout), 0.5, rpe, padding, shown.double(), attn_mask_mode="mul"
    )
    seen = exists & shown
    scores = (x * 0.5 + rpe + padding[:, None, None]).masked_fill(~seen, -torch.inf)
    wanted = scores.softmax(-1).masked_fill(~seen, 0.0)
    assert_same(found, blocks_of(wanted, layout), [x])


def test_attention_of_the_three_products_is_that_of_the_layer():
    module, config = layer()
    leaves = inputs(heads=4, kv_heads=4, length=32)
    query, key, value = leaves
    layout = config.make_layout(32)
    scores = MatMul(layout, 8, "sdd", trans_b=True)(query, key)
    weights = Softmax(layout, 8)(scores, scale=16**-0.5)
    assert_same(MatMul(layout, 8, "dsd")(weights, value), module(*leaves), leaves)


def test_block_products_refuse_what_does_not_fit():
    layout = random_layout(3, 4)
    with pytest.raises(NotImplementedError, match="none of"):
        MatMul(layout, BLOCK, "ddd")
    with pytest.raises(ValueError, match="a layout"):
        Softmax(layout[0], BLOCK)
    with pytest.raises(ValueError, match=r"a is .*; the layout needs \[b, 2, 12, \.\.\.\]"):
        MatMul(layout, BLOCK, "sdd")(random(1, 2, 16, 8), random(1, 2, 8, 16))
    with pytest.raises(ValueError, match="x is"):
        Softmax(layout, BLOCK)(random(1, 3, 4, 4))
