"""Scales move between modules only where nothing changes, and where it helps."""

from __future__ import annotations

import copy

import pytest
import torch
from drivetrain_compression import CompressionUnit, Target, compress_module
from drivetrain_compression.calibrated.grids import Integers, fit, round_to, weight_of
from drivetrain_compression.calibrated.pairs import Called, pairs
from tiny_models import Block, Chain, bert, llama, rows
from torch import nn

from drivetrain.states.units import units


def found_in(model, batch=None, **options):
    (unit, *_) = [u for u in units(model) if u.name]
    called = Called(unit.module)
    with torch.no_grad():
        cache = {"use_cache": False} if hasattr(model, "config") else {}
        model(input_ids=rows()[0] if batch is None else batch, **cache)
    targets = [
        Target(f"{unit.name}.{n}", m)
        for n, m in unit.module.named_modules()
        if isinstance(m, nn.Linear)
    ]
    made = CompressionUnit(unit.name, unit.module, tuple(targets))
    found = pairs(made, called.first, **options)
    return {
        pair.source: {t.name.removeprefix(f"{unit.name}.") for t in pair.targets} for pair in found
    }


QKV = {f"self_attn.{x}_proj" for x in "qkv"}
NORMS = {"input_layernorm": QKV, "post_attention_layernorm": {"mlp.gate_proj", "mlp.up_proj"}}


def test_pairs_of_a_decoder():
    more = {"mlp.up_proj": {"mlp.down_proj"}}
    assert found_in(llama()) == {**NORMS, **more}
    # With as many heads of values as of queries, values and the output pair up, too.
    every = {**NORMS, **more, "self_attn.v_proj": {"self_attn.o_proj"}}
    assert found_in(llama(num_key_value_heads=4)) == every
    assert found_in(llama(), norms_only=True) == NORMS


def test_pairs_where_tokens_are_as_many_as_features():
    assert found_in(llama(), torch.zeros(2, 32, dtype=torch.int64), norms_only=True) == NORMS


def test_norms_after_a_sum_are_left_alone():
    # In BERT the norm's output goes on to the sum, too: only values and their output pair up.
    assert found_in(bert()) == {"attention.self.value": {"attention.output.dense"}}


def test_an_output_that_somebody_else_takes_is_left_alone():
    assert found_in(Chain()) == {"norm": {"up"}, "up": {"down"}}
    assert found_in(Chain(leak=True)) == {"up": {"down"}}


@pytest.mark.parametrize(
    "recipe",
    [{"smoothquant": {"alpha": 0.7, "layers": False}}, {"smoothquant": {}}, {"awq": {"group": 16}}],
    ids=str,
)
def test_the_model_computes_the_same_after_smoothing(recipe):
    model = llama().double()
    before = copy.deepcopy(model)
    compress_module(model, {"modifiers": [recipe]}, rows())
    changed = [
        n for (n, p), q in zip(model.named_parameters(), before.parameters(), strict=True)
        if not torch.equal(p, q)
    ]  # fmt: skip
    assert len(changed) >= 3 * 7
    with torch.no_grad():
        a, b = (m(input_ids=rows()[0]).logits for m in (model, before))
    torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)


def test_smoothquant_shares_the_range_by_its_formula():
    model = Chain(depth=2)
    before = copy.deepcopy(model)
    data = rows()
    recipe = {"smoothquant": {"alpha": 0.75, "layers": False}}
    compress_module(model, {"modifiers": [recipe]}, data)
    first = before.layers[0]
    x = first.norm(torch.cat([before.embed(ids) for ids in data])).flatten(0, 1)
    by = x.abs().amax(0) ** 0.75 / first.up.weight.abs().amax(0) ** 0.25
    torch.testing.assert_close(model.layers[0].up.weight, first.up.weight * by)
    torch.testing.assert_close(model.layers[0].norm.weight, first.norm.weight / by)
    torch.testing.assert_close(model.layers[0].norm.bias, first.norm.bias / by)


def in_int8(x, weight):
    """Both rounded to 255 levels, with a scale for each row."""

    def rounded(rows):
        scale = rows.abs().amax(1, keepdim=True) / 127.5
        return (rows / scale).round().clamp(-128, 127) * scale

    return rounded(x) @ rounded(weight).T


def test_smoothquant_searches_what_layers_of_8_bits_are_off_least_by():
    model = Chain(depth=2)
    block = model.layers[0]
    block.norm.weight.data[3] = 60.0  # a feature that sticks out
    block.up.weight.data[5] *= 40.0  # and one of the next layer's
    before, data = copy.deepcopy(model), rows()
    compress_module(model, {"modifiers": [{"smoothquant": {}}]}, data)
    old, new = before.layers[0], model.layers[0]

    def off(block):
        x = torch.cat([before.embed(ids) for ids in data]).flatten(0, 1)
        made = in_int8(block.norm(x), block.up.weight) + block.up.bias
        made = in_int8(made.relu(), block.down.weight) + block.down.bias
        wanted = old(x) - x
        return float(((made - wanted).square().sum(1) / wanted.square().sum(1)).sum())

    with torch.no_grad():
        assert off(new) < 0.3 * off(old)


def test_awq_takes_the_scale_with_the_least_error_on_the_data():
    torch.manual_seed(0)
    model = Chain(depth=2)
    model.layers[0].norm.weight.data[3] = 30.0  # a feature that counts, with small weights
    model.layers[0].up.weight.data[:, 3] *= 0.1
    before = copy.deepcopy(model)
    data = rows()
    compress_module(model, {"modifiers": [{"awq": {"bits": 3, "group": 16, "steps": 8}}]}, data)
    block = before.layers[0]
    assert isinstance(block, Block)
    x = block.norm(torch.cat([before.embed(ids) for ids in data])).flatten(0, 1).detach()
    losses = []
    for step in range(8):
        by = x.abs().mean(0) ** (step / 8)
        by = by / (by.max() * by.min()).sqrt()
        weight = block.up.weight.detach() * by
        scales = fit(weight, Integers(3), 16)
        near = weight_of(round_to(weight, Integers(3), scales), scales) / by
        losses.append((float((x @ (near - block.up.weight).T).square().sum()), by))
    best = min(losses, key=lambda each: each[0])
    assert best[0] < 0.9 * losses[0][0]
    # Later pairs share their output's scale, so only the ratio of columns is this one's.
    found = (model.layers[0].norm.weight / block.norm.weight).detach()
    torch.testing.assert_close(found, 1 / best[1])
