"""DeepSpeed's encoder layer computes what a layer of Transformers' BERT does with its weights."""

from __future__ import annotations

import pytest
import tiny

from drivetrain.testing import run_distributed

NEEDS = ("transformers",)

pytestmark = pytest.mark.long


def compare():
    import torch
    from deepspeed import DeepSpeedTransformerConfig, DeepSpeedTransformerLayer
    from transformers import BertConfig
    from transformers.models.bert.modeling_bert import BertLayer

    tiny.start_anew()
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "intermediate_size": 48, "num_hidden_layers": 2}
    no_dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
    bert = BertLayer(
        BertConfig(**sizes, num_attention_heads=3, **no_dropout, attn_implementation="eager")
    )
    for parameter in bert.parameters():
        torch.nn.init.normal_(parameter)
    attention, output = bert.attention, bert.output
    own = attention.self
    modules = [own.query, own.key, own.value, attention.output.dense, attention.output.LayerNorm]
    modules += [bert.intermediate.dense, output.dense, output.LayerNorm]
    layer = DeepSpeedTransformerLayer(
        DeepSpeedTransformerConfig(
            **sizes,
            heads=3,
            attn_dropout_ratio=0.0,
            hidden_dropout_ratio=0.0,
            initializer_range=0.02,
            pre_layer_norm=False,
            return_tuple=True,
        ),
        [module.weight for module in modules],
        [module.bias for module in modules],
    )
    states = torch.randn(2, 5, 24)
    mask = torch.zeros(2, 1, 1, 5)
    mask[1, ..., 3:] = torch.finfo(mask.dtype).min
    expected = bert(states, attention_mask=mask)
    found = layer(states, mask)
    first = expected[0] if isinstance(expected, tuple) else expected
    return found[0].detach().numpy(), first.detach().numpy()


def test_with_its_weights():
    found, expected = run_distributed(compare, 1)[0]
    assert found == pytest.approx(expected, rel=1e-4, abs=1e-5)
