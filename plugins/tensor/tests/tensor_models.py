"""Small models of Transformers, built from configs, and batches for them."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import nn

VOCABULARY, TOKENS, ROWS = 50, 6, 2

_DECODER = {"vocab_size": VOCABULARY, "use_cache": False}
_LLAMA = {
    **_DECODER,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_BERT = {
    "vocab_size": VOCABULARY,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 16,
}
_T5 = {
    **_DECODER,
    "d_model": 16,
    "d_kv": 4,
    "d_ff": 24,
    "num_layers": 2,
    "num_heads": 4,
    "decoder_start_token_id": 0,
}
_GPT2 = {
    **_DECODER,
    "n_embd": 16,
    "n_layer": 2,
    "n_head": 4,
    "n_positions": 16,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
_MOE = {**_LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2}

MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt2": ("GPT2LMHeadModel", _GPT2),
    "llama": ("LlamaForCausalLM", _LLAMA),
    "bert": ("BertForMaskedLM", _BERT),
    "t5": ("T5ForConditionalGeneration", _T5),
    "mixtral": ("MixtralForCausalLM", _MOE),
}


def build(name: str, dropout: float = 0.0, **changes: Any) -> nn.Module:
    """A model in float64 with the same values on every rank."""
    kind, settings = MODELS[name]
    return build_class(kind, {**settings, **changes}, dropout)


def build_class(
    kind: str,
    settings: dict[str, Any],
    dropout: float = 0.0,
    dtype: torch.dtype = torch.float64,
) -> nn.Module:
    """A model of a class of Transformers; all dropout is set to one probability."""
    torch.manual_seed(0)
    model_type = getattr(transformers, kind)
    config = model_type.config_class(**settings)
    for key, value in list(vars(config).items()):
        if isinstance(value, float) and ("drop" in key or key.endswith("_pdrop")):
            setattr(config, key, dropout)
    config._experts_implementation = "eager"  # torch multiplies groups in float32 only
    model: nn.Module = model_type(config).to(dtype)
    return model


def batch(step: int, shard: int = 0) -> dict[str, torch.Tensor]:
    """Tokens, of which the model's own loss is computed."""
    generator = torch.Generator().manual_seed(100 * step + shard)
    tokens = torch.randint(3, VOCABULARY, (ROWS, TOKENS), generator=generator)
    return {"input_ids": tokens, "labels": tokens}


def loss_of(model: Any, step: int, shard: int = 0) -> torch.Tensor:
    """Cross-entropy in the dtype of the model, where Transformers' own is in float32."""
    tokens = batch(step, shard)
    logits = model(**tokens).logits
    return nn.functional.cross_entropy(logits.flatten(0, 1), tokens["labels"].flatten())


def reference(model: nn.Module, steps: int, shards: int = 1, rate: float = 0.1) -> list[float]:
    """Losses of plain SGD in one process."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    losses = []
    for step in range(steps):
        total = 0.0
        for shard in range(shards):
            loss = loss_of(model, step, shard) / shards
            loss.backward()
            total += loss.item()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses
