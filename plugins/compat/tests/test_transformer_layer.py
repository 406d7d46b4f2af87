"""The encoder layer computes what one of torch does, with every switch."""

from __future__ import annotations

import json

import pytest
import torch
from deepspeed import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer
from torch import nn

from drivetrain.errors import ConfigError

SIZES = {"hidden_size": 12, "intermediate_size": 40, "heads": 3, "num_hidden_layers": 2}
USUAL = {**SIZES, "attn_dropout_ratio": 0.0, "hidden_dropout_ratio": 0.0, "initializer_range": 0.1}


def config(**changes):
    return DeepSpeedTransformerConfig(**{**USUAL, **changes})


def reference(pre):
    """Torch's encoder layer in float64, with values everywhere."""
    torch.manual_seed(0)
    layer = nn.TransformerEncoderLayer(
        12, 3, 40, 0.0, "gelu", 1e-12, batch_first=True, norm_first=pre, dtype=torch.float64
    )
    for parameter in layer.parameters():
        nn.init.uniform_(parameter, 0.2, 0.7)
        parameter.data *= torch.randint_like(parameter, 0, 2) * 2 - 1
    return layer


def tensors(layer, pre):
    """The eight weights and biases of torch's layer in BERT's order."""
    attention = layer.self_attn
    norms = (layer.norm2, layer.norm1) if pre else (layer.norm1, layer.norm2)
    modules = [attention.out_proj, norms[0], layer.linear1, layer.linear2, norms[1]]
    weights = [*attention.in_proj_weight.chunk(3), *(m.weight for m in modules)]
    return weights, [*attention.in_proj_bias.chunk(3), *(m.bias for m in modules)]


def data():
    """Inputs and a mask that is added to scores; the last two tokens of one sample are padding."""
    torch.manual_seed(1)
    mask = torch.zeros(2, 1, 1, 5, dtype=torch.float64)
    mask[1, :, :, 3:] = -10000.0
    return torch.randn(2, 5, 12, dtype=torch.float64, requires_grad=True), mask


def gradients(output, inputs, layer):
    draw = torch.Generator().manual_seed(2)
    output.backward(torch.randn(output.shape, generator=draw, dtype=output.dtype))
    return {"inputs": inputs.grad, **{n: p.grad for n, p in layer.named_parameters()}}


@pytest.mark.parametrize("pre", [False, True])
@pytest.mark.parametrize(
    "switch", [None, "normalize_invertible", "gelu_checkpoint", "attn_dropout_checkpoint"]
)
def test_it_equals_torchs_layer(pre, switch):
    plain = reference(pre)
    switches = {} if switch is None else {switch: True}
    weights, biases = tensors(plain, pre)
    layer = DeepSpeedTransformerLayer(config(pre_layer_norm=pre, **switches), weights, biases)
    layer = layer.double()
    layer.load_state_dict(  # the copy went through float32
        {
            f"{name}{end}": value
            for end, given in (("w", weights), ("b", biases))
            for name, value in zip(
                ("attn_qkv", "attn_o", "attn_n", "inter_", "output_", "norm_"),
                [torch.cat(given[:3]), *given[3:]],
                strict=True,
            )
        }
    )
    inputs, mask = data()
    same, _ = data()
    output = layer(inputs, mask)
    expected = plain(same, src_key_padding_mask=mask[:, 0, 0] < 0)
    torch.testing.assert_close(output, expected)
    found, wanted = gradients(output, inputs, layer), gradients(expected, same, plain)
    first, second = ("norm1", "norm2") if pre else ("norm2", "norm1")
    pairs = {
        "inputs": "inputs",
        "attn_qkvw": "self_attn.in_proj_weight",
        "attn_qkvb": "self_attn.in_proj_bias",
        "attn_ow": "self_attn.out_proj.weight",
        "attn_nb": f"{second}.bias",
        "attn_nw": f"{second}.weight",
        "inter_w": "linear1.weight",
        "output_b": "linear2.bias",
        "norm_w": f"{first}.weight",
        "norm_b": f"{first}.bias",
    }
    for ours, theirs in pairs.items():
        torch.testing.assert_close(found[ours], wanted[theirs], msg=lambda m, n=ours: f"{n}: {m}")


@pytest.mark.parametrize("switch", ["gelu_checkpoint", "attn_dropout_checkpoint"])
def test_what_is_computed_again_drops_the_same(switch):
    rates = {"attn_dropout_ratio": 0.5, "hidden_dropout_ratio": 0.5}
    found = []
    for switches in ({}, {switch: True}):
        torch.manual_seed(3)
        layer = DeepSpeedTransformerLayer(config(**rates, **switches))
        inputs, mask = data()
        output = layer.double()(inputs, mask)
        found.append((output.detach(), gradients(output, inputs, layer)))
    torch.testing.assert_close(found[0], found[1])


def test_dropout_is_for_training_alone():
    layer = DeepSpeedTransformerLayer(config(hidden_dropout_ratio=0.5, attn_dropout_ratio=0.5))
    inputs = data()[0].float()
    assert not torch.equal(layer(inputs), layer(inputs))
    layer.eval()
    assert torch.equal(layer(inputs), layer(inputs))
    layer.train()
    layer.config.training = False
    assert torch.equal(layer(inputs), layer(inputs))


def test_switches_keep_less_for_backward():
    kept = {}
    for name in (None, "gelu_checkpoint", "normalize_invertible"):
        layer = DeepSpeedTransformerLayer(
            config(pre_layer_norm=False, **({} if name is None else {name: True}))
        )
        storages = {}

        def note(tensor, storages=storages):
            storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            layer(data()[0].float().detach())
        kept[name] = sum(storages.values())
    assert kept["gelu_checkpoint"] < kept[None]
    assert kept["normalize_invertible"] < kept[None]


def test_new_weights_have_the_deviation_of_the_config():
    torch.manual_seed(0)
    wide = {"hidden_size": 96, "intermediate_size": -1, "num_hidden_layers": 8}
    layer = DeepSpeedTransformerLayer(config(**wide))
    assert layer.inter_w.shape == (384, 96)
    assert layer.attn_qkvw.std().item() == pytest.approx(0.1, rel=0.05)
    assert layer.output_w.std().item() == pytest.approx(0.025, rel=0.05)
    assert DeepSpeedTransformerLayer(
        config(**wide, adjust_init_range=False)
    ).output_w.std().item() == pytest.approx(0.1, rel=0.05)
    assert layer.norm_w.eq(1).all()
    assert layer.attn_qkvb.eq(0).all()


def test_configs_come_from_dicts_and_files(tmp_path):
    path = tmp_path / "layer.json"
    path.write_text(json.dumps(USUAL | {"return_tuple": True}))
    read = DeepSpeedTransformerConfig.from_json_file(path)
    assert read == config(return_tuple=True)
    (output,) = DeepSpeedTransformerLayer(read)(torch.randn(1, 2, 12), output_attentions=False)
    assert output.shape == (1, 2, 12)
    with pytest.raises(ConfigError, match="has no 'head'; did you mean 'heads'"):
        DeepSpeedTransformerConfig.from_dict({"head": 3})


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"heads": 5}, "hidden_size 12 must be a multiple of heads 5"),
        ({"hidden_size": -1}, "hidden_size must be given and positive, got -1"),
        ({"attn_dropout_ratio": -1}, "attn_dropout_ratio must be given, at least 0"),
    ],
)
def test_a_config_that_makes_no_layer_is_refused(changes, text):
    with pytest.raises(ConfigError, match=text):
        DeepSpeedTransformerLayer(config(**changes))


def test_arguments_that_an_encoder_layer_has_no_use_for_are_refused():
    layer = DeepSpeedTransformerLayer(config())
    with pytest.raises(ConfigError, match="takes hidden_states and attention_mask only"):
        layer(torch.randn(1, 2, 12), None, torch.ones(3))
    with pytest.raises(ConfigError, match="takes hidden_states and attention_mask only"):
        layer(torch.randn(1, 2, 12), output_attentions=True)
    with pytest.raises(ConfigError, match="each of 8 tensors, got 3 and 0"):
        DeepSpeedTransformerLayer(config(), [torch.ones(1)] * 3)
