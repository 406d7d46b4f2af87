"""Inputs rounded with one scale a layer, known from the calibration data."""

from __future__ import annotations

import copy

import pytest
import torch
from drivetrain_compression import compress_module
from tiny_models import Chain, rows

from drivetrain.errors import ConfigError

STATIC = {"bits": 8, "activations": "int8", "activation_scales": "static"}


def by_hand(layer, x, weight):
    """x and the weight as numbers of 8 bits, in float64; scales from the largest of all data."""
    step = x.abs().max() / 127.5
    return layer(x), torch.round(x / step).clamp(-128, 127) * step @ weight.double().T + layer.bias


@pytest.mark.parametrize("method", ["round", "gptq", "zeroquant"])
def test_the_scale_is_that_of_the_largest_input_of_the_data(method):
    model, data = Chain(depth=2), rows()
    block = copy.deepcopy(model).layers[0].double()
    steps = {"steps": 1, "learning_rate": 1e-12} if method == "zeroquant" else {}
    found = compress_module(model, {"modifiers": [{method: {**STATIC, **steps}}]}, data)
    x = block.norm(model.embed(torch.cat(data)).double()).detach()
    up = model.layers[0].up
    rounded = found["layers.0"].rounded["layers.0.up"]
    assert rounded.input_scale == pytest.approx(float(x.abs().max()) / 127.5, rel=1e-5)
    _, wanted = by_hand(block.up, x, up.weight.detach())
    torch.testing.assert_close(up(x.float()).double(), wanted, rtol=1e-4, atol=1e-4)


def test_what_is_larger_than_the_data_is_cut():
    model, data = Chain(depth=2), rows()
    found = compress_module(model, {"modifiers": [{"round": STATIC}]}, data)
    scale = found["layers.1"].rounded["layers.1.up"].input_scale
    up = model.layers[1].up
    huge = torch.full((1, 16), 1000.0)
    with torch.no_grad():
        torch.testing.assert_close(up(huge), up(torch.full((1, 16), 127 * scale)))


def test_the_error_is_small_where_data_is_alike():
    model = Chain()
    exact = model(rows()[0]).detach()
    compress_module(model, {"modifiers": [{"round": STATIC}]}, rows())
    assert float((model(rows()[0]) - exact).norm() / exact.norm()) < 0.03


def test_static_scales_need_inputs_that_are_rounded_and_data():
    alone = {"modifiers": [{"round": {"bits": 8, "activation_scales": "static"}}]}
    with pytest.raises(ConfigError, match="static needs activations to round"):
        compress_module(Chain(), alone, rows())
    with pytest.raises(ConfigError, match="needs calibration data"):
        compress_module(Chain(), {"modifiers": [{"round": STATIC}]})
