"""Models of Transformers, as they are, train with a layout as plain torch does with its mask."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from sparse_models import batch, engine_of, mask_of, plain, tiny, train
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError, TrainingError

BIGBIRD = {"mode": "bigbird", "block": 4, "num_random_blocks": 1}
FIXED = {"mode": "fixed", "block": 4, "num_local_blocks": 3}
VARIABLE = {"mode": "variable", "block": 5, "local_window_blocks": [1, 2]}
LONGFORMER = {"mode": "bslongformer", "block": 4, "global_block_indices": [0, 3]}
LOCAL = {"mode": "local", "block": 4, "attention": "unidirectional"}
HEADS = {"mode": "bigbird", "block": 4, "different_layout_per_head": True}

CASES = [
    ("llama", "plain", BIGBIRD),
    ("llama", "padded", FIXED),
    ("llama", "packed", LONGFORMER),
    ("gpt2", "plain", VARIABLE),
    ("gpt2", "padded", LOCAL),
    ("qwen", "packed", FIXED),
    ("mistral", "plain", BIGBIRD),
    ("bert", "plain", LONGFORMER),
    ("bert", "padded", BIGBIRD),
    ("llama", "plain", HEADS),
]


@pytest.mark.parametrize(("name", "kind", "settings"), CASES)
def test_losses_and_weights_are_those_of_the_mask(name, kind, settings):
    engine, model = engine_of(tiny(name), sparse_attention=settings), tiny(name)
    found, wanted = train(engine, kind), plain(model, name, kind, settings)
    assert found == pytest.approx(wanted, rel=1e-9)
    weights = engine.module_state_dict()
    for key, value in model.state_dict().items():
        torch.testing.assert_close(weights[key], value, rtol=1e-7, atol=1e-9)
    engine.destroy()


def test_a_layout_matters():
    engine = engine_of(tiny("llama"), sparse_attention=FIXED)
    found, dense = train(engine, "plain"), train(engine_of(tiny("llama")), "plain")
    assert abs(found[0] - dense[0]) > 1e-3


@pytest.mark.parametrize("settings", [{"mode": "dense"}, {"mode": "topk", "block": 4, "top_k": 99}])
def test_all_blocks_are_dense_attention(settings):
    engine = engine_of(tiny("llama"), sparse_attention=settings)
    wanted = train(engine_of(tiny("llama")), "padded")
    assert train(engine, "padded") == pytest.approx(wanted, rel=1e-9)


def test_chosen_blocks_learn():
    engine = engine_of(tiny("llama"), sparse_attention={"mode": "topk", "block": 4, "top_k": 3})
    losses = [train(engine, "packed")[0] for _ in range(6)]
    assert losses[-1] < losses[0]


def test_a_sequence_of_few_blocks_sees_all():
    engine = engine_of(tiny("llama"), sparse_attention=BIGBIRD)
    wanted = train(engine_of(tiny("llama")), "plain", length=7)
    assert train(engine, "plain", length=7) == pytest.approx(wanted, rel=1e-9)


class Own(nn.Module):
    """A model of the user's own, which attends through drivetrain."""

    def __init__(self) -> None:
        super().__init__()
        self.width = nn.Linear(8, 8).double()

    def forward(self, x: torch.Tensor, **facts: Any) -> torch.Tensor:
        y = self.width(x).unflatten(-1, (2, 4)).transpose(1, 2)
        return drivetrain.attention(self, y, y, y, **facts).flatten(2)


def test_a_model_of_the_users_own_and_sinks():
    from sparse_reference import dense, tokens_of

    module = Own()
    x = torch.randn(2, 20, 8, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    sinks = torch.tensor([0.3, -1.0], dtype=torch.float64)
    engine = engine_of(module, sparse_attention=FIXED)
    found = engine(x, causal=True, sinks=sinks)
    y = module.width(x).unflatten(-1, (2, 4)).transpose(1, 2)
    seen = tokens_of(
        torch.tensor([[i // 3 == j // 3 or j % 3 == 2 for j in range(5)] for i in range(5)]), 4, 20
    )
    # A sink is one more key, whose value is 0.
    extra = [torch.cat([y, z], 2) for z in (torch.zeros(2, 2, 1, 4).double(),) * 2]
    seen = nn.functional.pad(seen.tril(), (0, 1), value=True)
    bias = torch.zeros(1, 2, 20, 21, dtype=torch.float64)
    bias[..., -1] = sinks[None, :, None]
    torch.testing.assert_close(found, dense(y, *extra, seen, bias=bias).transpose(1, 2).flatten(2))


@pytest.mark.parametrize(
    ("facts", "message"),
    [({"dropout": 0.1}, "attn_pdrop"), ({"softcap": 3.0}, "softcap")],
)
def test_what_is_not_done_by_blocks_is_refused_by_name(facts, message):
    engine = engine_of(Own(), sparse_attention=FIXED)
    with pytest.raises(TrainingError, match=message):
        engine(torch.randn(1, 20, 8, dtype=torch.float64), **facts)


def test_dropout_of_a_models_attention_is_refused():
    model = tiny("gpt2", attn_pdrop=0.1)
    engine = engine_of(model, sparse_attention=FIXED)
    with pytest.raises(TrainingError, match=r"drops 0.1 of its attention weights"):
        engine(**batch(0, "plain"))


def test_a_cache_is_refused():
    engine = engine_of(tiny("llama"), sparse_attention=FIXED)
    with pytest.raises(TrainingError, match="use_cache=False"):
        engine.module.generate(batch(0, "plain")["input_ids"], max_new_tokens=3, do_sample=False)


def test_an_encoder_with_a_decoder_is_refused():
    import transformers

    sizes = {"vocab_size": 40, "d_model": 16, "encoder_layers": 1, "decoder_layers": 1}
    heads = {"encoder_attention_heads": 2, "decoder_attention_heads": 2}
    config = transformers.BartConfig(**sizes, **heads, encoder_ffn_dim=8, decoder_ffn_dim=8)
    engine = engine_of(transformers.BartForConditionalGeneration(config), sparse_attention=FIXED)
    with pytest.raises(TrainingError, match="encoder and decoder"):
        engine(**batch(0, "plain"))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"mode": "windows"}, "mode"),
        ({"block": 0}, "block"),
        ({"attention": "sideways"}, "'sideways'"),
        ({"num_local_blocks": 4, "num_global_blocks": 3}, "does not divide"),
        ({"num_different_global_patterns": 2}, "different_layout_per_head"),
        ({"mode": "bslongformer", "global_block_end_indices": [1, 2]}, "have 2"),
        ({"top_q": 3}, "top_q"),
    ],
)
def test_bad_settings_are_refused_before_the_run(settings, message):
    with pytest.raises(ConfigError, match=message):
        engine_of(tiny("llama"), sparse_attention=settings)


def test_the_mask_of_the_reference_is_sparse():
    seen = mask_of("llama", "plain", {}, BIGBIRD, 45)
    assert seen.shape == (2, 4, 45, 45)
    assert 0.2 < float(seen.double().mean()) < 0.45
