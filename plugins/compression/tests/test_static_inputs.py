"""Inputs rounded with one scale a layer, known from the calibration data."""

from __future__ import annotations

import copy
import dataclasses

import pytest
import torch
from drivetrain_compression import compress_module
from drivetrain_compression.calibrated.grids import Integers, Scales
from drivetrain_compression.calibrated.results import Rounded
from drivetrain_compression.files import compressed_tensors, own
from tiny_models import Chain, rows

from drivetrain.errors import CheckpointError, ConfigError

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


@pytest.mark.parametrize("kind", ["int8", "e4m3"])
def test_scales_of_tiny_inputs_are_not_stored_as_0(kind):
    model = Chain(depth=2).half()
    with torch.no_grad():
        for layer in model.layers:
            layer.norm.weight.fill_(1e-7)
    recipe = {**STATIC, "activations": kind}
    found = compress_module(model, {"modifiers": [{"round": recipe}]}, rows())
    scale = found["layers.0"].rounded["layers.0.up"].input_scale
    assert scale == pytest.approx(2.0**-24)  # the smallest number of float16
    assert torch.isfinite(model(rows()[0])).all()


def test_inputs_with_nan_have_no_scale():
    model = Chain(depth=2)
    with torch.no_grad():
        model.embed.weight[:, 3] = torch.nan
    with pytest.raises(ConfigError, match=r"inputs of layers\.0\.up have NaN"):
        compress_module(model, {"modifiers": [{"round": STATIC}]}, rows())


@pytest.mark.parametrize("scale", [0.0, -1.0, float("nan"), float("inf")])
@pytest.mark.parametrize("layout", [own, compressed_tensors])
def test_scales_that_are_no_positive_numbers_are_refused_when_read(layout, scale):
    numbers = torch.zeros(4, 8)
    scales = Scales(torch.ones(4, 1), torch.zeros(4, 1), 8)
    made = Rounded(numbers, scales, Integers(8), "int8", input_scale=scale)
    tensors, facts = layout.tensors_of("up", made, torch.float32), layout.facts("up", made)
    with pytest.raises(CheckpointError, match=r"up: input_scale is .* finite number above 0"):
        layout.read("up", facts, tensors)
    good = dataclasses.replace(made, input_scale=0.5)
    tensors, facts = layout.tensors_of("up", good, torch.float32), layout.facts("up", good)
    assert layout.read("up", facts, tensors).input_scale == 0.5
