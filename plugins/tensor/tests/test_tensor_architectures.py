"""Architectures of Transformers, tiny and unchanged, train on two ranks as they do on one."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from drivetrain_tensor.analysis import analyse
from drivetrain_tensor.rules import Rules
from tensor_models import VOCABULARY, build_class, loss_of, reference
from test_tensor_training import make

from drivetrain.testing import run_distributed

SMALL = {
    **dict.fromkeys(("vocab_size",), VOCABULARY),
    **dict.fromkeys(("hidden_size", "d_model", "n_embd", "dim", "embedding_size"), 16),
    **dict.fromkeys(("num_attention_heads", "n_head", "num_heads", "n_heads"), 4),
    **dict.fromkeys(("encoder_attention_heads", "decoder_attention_heads"), 4),
    **dict.fromkeys(("num_hidden_layers", "n_layer", "num_layers", "n_layers"), 2),
    **dict.fromkeys(("encoder_layers", "decoder_layers"), 2),
    **dict.fromkeys(("intermediate_size", "ffn_dim", "hidden_dim", "d_ff"), 24),
    **dict.fromkeys(("encoder_ffn_dim", "decoder_ffn_dim"), 24),
    **dict.fromkeys(("max_position_embeddings", "n_positions", "max_seq_len"), 32),
    "num_key_value_heads": 2,
    "head_dim": 4,
    "d_kv": 4,
    "rotary_dim": 4,
    "word_embed_proj_dim": 16,
}
SPECIAL = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0, "decoder_start_token_id": 0}

CLASSES = (
    *["ApertusForCausalLM", "ArceeForCausalLM", "BartForConditionalGeneration", "BertForMaskedLM"],
    *["BioGptForCausalLM", "BloomForCausalLM", "CamembertForMaskedLM", "CohereForCausalLM"],
    *[
        "DistilBertForMaskedLM",
        "ElectraForMaskedLM",
        "Exaone4ForCausalLM",
        "FalconForCausalLM",
    ],
    *["GemmaForCausalLM", "GlmForCausalLM", "GPT2LMHeadModel", "GPTNeoForCausalLM"],
    *["GptOssForCausalLM"],
    *["GPTNeoXForCausalLM", "GPTJForCausalLM", "GraniteForCausalLM", "HeliumForCausalLM"],
    *["LlamaForCausalLM", "MBartForConditionalGeneration", "MistralForCausalLM"],
    *["NemotronForCausalLM", "OPTForCausalLM", "OlmoForCausalLM", "PhiForCausalLM"],
    *["Phi3ForCausalLM", "Qwen2ForCausalLM", "Qwen3ForCausalLM", "RobertaForMaskedLM"],
    *["SmolLM3ForCausalLM", "StableLmForCausalLM", "Starcoder2ForCausalLM"],
    *[
        "T5ForConditionalGeneration",
        "XGLMForCausalLM",
    ],
)
SINGLE = ("XGLMForCausalLM",)
"""Classes whose forward fails in float64: it fills a float32 tensor with the least float64."""


def settings(kind: str) -> dict[str, Any]:
    """Small values of those keys that a config has."""
    import transformers

    config = getattr(transformers, kind).config_class()
    small = {key: value for key, value in SMALL.items() if _is_set(config, key)}
    if kind == "GPTNeoForCausalLM":
        small["attention_types"] = [[["global", "local"], 1]]
    return small | SPECIAL


def built(kind: str) -> Any:
    return build_class(
        kind, settings(kind), dtype=torch.float32 if kind in SINGLE else torch.float64
    )


def _is_set(config: Any, key: str) -> bool:
    """Whether a config has ``key``, and does not compute it from others."""
    of_class = getattr(type(config), key, None)
    computed = isinstance(of_class, property) and of_class.fset is None
    return hasattr(config, key) and not computed


def trained(kinds: tuple[str, ...]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for kind in kinds:
        engine = make(built(kind), 2)
        losses = []
        for step in range(2):
            loss = loss_of(engine, step)
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
        parameters = list(engine.module.parameters())
        found[kind] = (
            losses,
            sum(engine.job.parameters.info(p).placement is not None for p in parameters),
        )
        engine.destroy()
    return found


def test_what_lies_between_layers_is_cut_in_every_block() -> None:
    model = built("GptOssForCausalLM")
    cut = {
        each.name
        for decision in analyse(model, 2, Rules(None, model)).decisions
        for each in decision.adaptations[1].slices
    }
    assert cut == {f"model.layers.{layer}.self_attn.sinks" for layer in range(2)}


@pytest.mark.long
@pytest.mark.parametrize("kind", CLASSES)
def test_an_architecture_trains_on_two_ranks_as_on_one(kind: str) -> None:
    for result in run_distributed(trained, 2, (kind,)):
        losses, cut = result[kind]
        torch.manual_seed(0)
        expected = reference(built(kind), 2)
        assert losses == pytest.approx(expected, rel=1e-5 if kind in SINGLE else 1e-6)
        assert cut >= 4
