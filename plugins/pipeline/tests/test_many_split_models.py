"""Many architectures of Transformers, each built from a small config, split over two stages."""

from __future__ import annotations

from typing import Any

import pytest
from tiny_models import DECODER, data, make, train_alone
from torch import nn

import drivetrain
from drivetrain.testing import run_distributed

MICRO_BATCHES, RATE = 2, 0.1

ENCODER = {key: value for key, value in DECODER.items() if key != "num_key_value_heads"}
BART = {
    "vocab_size": 50,
    "d_model": 16,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "decoder_ffn_dim": 24,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
    "decoder_start_token_id": 2,
}
NAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "MistralForCausalLM": ("MistralConfig", DECODER),
    "Qwen2ForCausalLM": ("Qwen2Config", DECODER),
    "Qwen3ForCausalLM": ("Qwen3Config", {**DECODER, "head_dim": 8}),
    "GemmaForCausalLM": ("GemmaConfig", {**DECODER, "head_dim": 8}),
    "Gemma3ForCausalLM": ("Gemma3TextConfig", {**DECODER, "head_dim": 8}),
    "PhiForCausalLM": ("PhiConfig", DECODER),
    "Phi3ForCausalLM": ("Phi3Config", DECODER),
    "StableLmForCausalLM": ("StableLmConfig", DECODER),
    "OlmoForCausalLM": ("OlmoConfig", DECODER),
    "Olmo2ForCausalLM": ("Olmo2Config", DECODER),
    "Starcoder2ForCausalLM": ("Starcoder2Config", DECODER),
    "CohereForCausalLM": ("CohereConfig", DECODER),
    "GraniteForCausalLM": ("GraniteConfig", DECODER),
    "HeliumForCausalLM": ("HeliumConfig", {**DECODER, "head_dim": 8}),
    "SmolLM3ForCausalLM": ("SmolLM3Config", DECODER),
    "GlmForCausalLM": ("GlmConfig", {**DECODER, "head_dim": 8}),
    "NemotronForCausalLM": ("NemotronConfig", DECODER),
    "GPTNeoXForCausalLM": ("GPTNeoXConfig", ENCODER),
    "BloomForCausalLM": (
        "BloomConfig",
        {"vocab_size": 50, "hidden_size": 16, "n_layer": 4, "n_head": 2},
    ),
    "FalconForCausalLM": ("FalconConfig", ENCODER),
    "GPTJForCausalLM": (
        "GPTJConfig",
        {
            "vocab_size": 50,
            "n_embd": 16,
            "n_layer": 4,
            "n_head": 2,
            "rotary_dim": 4,
            "n_positions": 16,
        },
    ),
    "GPTBigCodeForCausalLM": (
        "GPTBigCodeConfig",
        {"vocab_size": 50, "n_embd": 16, "n_layer": 4, "n_head": 2, "n_positions": 16},
    ),
    "Qwen3MoeForCausalLM": (
        "Qwen3MoeConfig",
        {
            **DECODER,
            "head_dim": 8,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 8,
        },
    ),
    "OlmoeForCausalLM": ("OlmoeConfig", {**DECODER, "num_experts": 4, "num_experts_per_tok": 2}),
    "RobertaForMaskedLM": (
        "RobertaConfig",
        {**ENCODER, "pad_token_id": 1, "max_position_embeddings": 20},
    ),
    "ElectraForMaskedLM": ("ElectraConfig", {**ENCODER, "embedding_size": 8}),
    "DistilBertForMaskedLM": (
        "DistilBertConfig",
        {
            "vocab_size": 50,
            "dim": 16,
            "hidden_dim": 24,
            "n_layers": 4,
            "n_heads": 2,
            "max_position_embeddings": 16,
        },
    ),
    "MPNetForMaskedLM": (
        "MPNetConfig",
        {**ENCODER, "pad_token_id": 1, "max_position_embeddings": 20},
    ),
    "DebertaV2ForMaskedLM": ("DebertaV2Config", ENCODER),
    "BartForConditionalGeneration": ("BartConfig", BART),
    "PegasusForConditionalGeneration": ("PegasusConfig", BART),
    "MarianMTModel": ("MarianConfig", BART),
    "MT5ForConditionalGeneration": (
        "MT5Config",
        {
            "vocab_size": 50,
            "d_model": 16,
            "d_kv": 8,
            "d_ff": 24,
            "num_layers": 2,
            "num_heads": 2,
            "decoder_start_token_id": 0,
        },
    ),
}


def build(name: str) -> nn.Module:
    config, options = NAMED[name]
    return make(config, name, **options)


def train(names: list[str]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in names:
        engine, *_ = drivetrain.initialize(
            model=build(name),
            config={
                "train_micro_batch_size_per_gpu": 2,
                "gradient_accumulation_steps": MICRO_BATCHES,
                "gradient_clipping": 0.0,
                "optimizer": {"type": "SGD", "params": {"lr": RATE}},
                "pipeline": {"stages": 2},
            },
        )
        engine.get_global_grad_norm()
        curve = []
        for step in data(2, MICRO_BATCHES, 1):
            loss = engine.train_batch(iter([micro[0] for micro in step])).item()
            curve.append((loss, engine.get_global_grad_norm()))
        found[name] = curve
        engine.destroy()
        engine.job.close()
    return found


@pytest.mark.long
@pytest.mark.parametrize("name", NAMED)
def test_it_trains_like_one_process(name: str) -> None:
    expected, _ = train_alone(build(name), 2, MICRO_BATCHES, 1, RATE)
    for ranks in run_distributed(train, 2, [name], timeout=200):
        for point, want in zip(ranks[name], expected, strict=True):
            assert point == pytest.approx(want, rel=1e-6)
