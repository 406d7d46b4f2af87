"""Cleaning leaves ordinary, smaller modules that compute what the masked ones did."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from compressed_models import ConvNet, batches, group, method, net
from drivetrain_compression.section import CompressionSection
from drivetrain_compression.training.build import modifiers_of
from drivetrain_compression.training.session import Session, session_of
from torch import nn

from drivetrain.errors import ConfigError


def session(model: nn.Module, section: dict[str, Any]) -> Session:
    made = Session(model, modifiers_of(CompressionSection.model_validate(section)))
    made.catch_up(0)
    return made


def ordinary(model: nn.Module) -> bool:
    kinds = {type(m).__name__ for m in model.modules()}
    names = {*model.state_dict()}
    return not [k for k in kinds if "Compressed" in k] and not [
        n for n in names if "mask" in n or "scores" in n
    ]


@pytest.mark.parametrize("how", ["l1", "topk"])
def test_rows_are_removed_with_what_reads_them(how: str) -> None:
    model = net()
    groups = {"g": group([r"\.up"], [[r"\.down"]], dense_ratio=0.3)}
    made = session(model, {"row_pruning": method({"method": how, "schedule_offset": 0}, groups)})
    tokens, _ = batches(1)[0]
    masked = model.logits(tokens)
    lines = made.finish(model)
    assert lines[0] == "layers.0.up: 10 of 32 rows kept, and in layers.0.down"
    assert [tuple(model.layers[0].up.weight.shape), model.layers[0].down.in_features] == [
        (10, 8),
        10,
    ]
    assert model.layers[1].up.bias.shape == (10,)
    torch.testing.assert_close(model.logits(tokens), masked, rtol=1e-13, atol=1e-14)
    assert ordinary(model)
    assert session_of(model) is None


@pytest.mark.parametrize("how", ["l1", "topk"])
def test_heads_are_removed_with_queries_keys_and_values(how: str) -> None:
    model = net()
    groups = {"g": group(["output"], [["query", "key", "value"]], dense_ratio=0.5)}
    shared = {"method": how, "schedule_offset": 0, "num_heads": 2}
    made = session(model, {"head_pruning": method(shared, groups)})
    tokens, _ = batches(1)[0]
    masked = model.logits(tokens)
    made.finish(model)
    assert model.layers[0].query.weight.shape == (4, 8)
    assert model.layers[0].output.weight.shape == (8, 4)
    torch.testing.assert_close(model.logits(tokens), masked, rtol=1e-13, atol=1e-14)
    assert ordinary(model)


@pytest.mark.parametrize("training", [False, True])
def test_channels_are_removed_through_a_batch_norm(training: bool) -> None:
    torch.manual_seed(2)
    model = ConvNet().double()
    images = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    with torch.no_grad():
        model.bn1.bias.uniform_(0.5, 1)
        for _ in range(3):
            model(images)
    groups = {"g": group(["conv1"], [["bn1", "conv2"]], dense_ratio=0.5)}
    made = session(model, {"channel_pruning": method({"schedule_offset": 0}, groups)})
    model.train(training)
    masked = model(images)
    (line,) = made.finish(model)
    assert line == "conv1: 4 of 8 channels kept, and in bn1, conv2"
    assert (model.conv1.out_channels, model.bn1.num_features, model.conv2.in_channels) == (4, 4, 4)
    torch.testing.assert_close(model(images), masked, rtol=1e-12, atol=1e-13)
    assert ordinary(model)


def test_a_linear_layer_behind_a_flattened_image_loses_its_inputs() -> None:
    torch.manual_seed(2)
    model = ConvNet().double()
    groups = {"g": group(["conv2"], [["fc"]], dense_ratio=0.5)}
    made = session(model, {"channel_pruning": method({"schedule_offset": 0}, groups)})
    model.eval()
    images = torch.randn(6, 3, 4, 4, dtype=torch.float64)
    masked = model(images)
    made.finish(model)
    assert model.fc.in_features == 32
    torch.testing.assert_close(model(images), masked, rtol=1e-12, atol=1e-13)


def test_everything_at_once_is_baked_in_the_order_of_the_forward() -> None:
    model = net()
    bits = {"start_bits": 4, "target_bits": 4}
    made = session(
        model,
        {
            "weight_quantization": method(
                {"quantize_groups": 2}, {"g": group(["up", "embed"], **bits)}
            ),
            "sparse_pruning": method(
                {"schedule_offset": 0}, {"g": group(["up", "key"], dense_ratio=0.6)}
            ),
            "row_pruning": method(
                {"schedule_offset": 0}, {"g": group(["up"], [["down"]], dense_ratio=0.5)}
            ),
        },
    )
    tokens, _ = batches(1)[0]
    masked = model.logits(tokens)
    made.finish(model)
    torch.testing.assert_close(model.logits(tokens), masked, rtol=1e-13, atol=1e-14)
    assert ordinary(model)
    assert (model.layers[0].key.weight == 0).sum() == 64 - 39
    assert len(model.layers[0].up.weight.unique()) <= 2 * 16 + 1


def test_before_the_offset_nothing_is_put_in() -> None:
    model, before = net(), net()
    made = session(
        model,
        {
            "row_pruning": method(
                {"schedule_offset": 5}, {"g": group(["up"], [["down"]], dense_ratio=0.5)}
            )
        },
    )
    assert made.finish(model) == []
    for a, b in zip(model.parameters(), before.parameters(), strict=True):
        assert torch.equal(a, b)
    assert ordinary(model)


def test_related_modules_of_other_dimensions_are_refused() -> None:
    model = net()
    groups = {"g": group([r"\.up"], [[r"\.output"]], dense_ratio=0.3)}
    made = session(model, {"row_pruning": method({"schedule_offset": 0}, groups)})
    with pytest.raises(ConfigError, match=r"layers.0.output has 8 inputs, but .* has 32 parts"):
        made.finish(model)


def test_weights_that_are_not_finite_are_named() -> None:
    model = net()
    with torch.no_grad():
        model.layers[1].up.weight[3, 2] = torch.nan
    made = session(
        model,
        {"weight_quantization": method({}, {"g": group(["up"], start_bits=4, target_bits=4)})},
    )
    with pytest.raises(ConfigError, match=r"layers.1.up.weight has numbers that are not finite"):
        made.finish(model)
