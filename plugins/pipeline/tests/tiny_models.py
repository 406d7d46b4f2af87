"""Small models of Transformers, built from configs: one of each kind of shape."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

VOCABULARY, WIDTH, LENGTH, ROWS = 50, 16, 6, 2
"""Size of the vocabulary, model width, tokens of a sequence, sequences of a micro-batch."""

DECODER = {
    "vocab_size": VOCABULARY,
    "hidden_size": WIDTH,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 16,
    "pad_token_id": 0,
}


def make(config_name: str, class_name: str, **changes: Any) -> nn.Module:
    """A model of Transformers in float64, always the same values; eager attention, no dropout."""
    import transformers

    torch.manual_seed(0)
    config = getattr(transformers, config_name)(**changes)
    config._attn_implementation = config._experts_implementation = "eager"
    for name in vars(config):
        if "drop" in name and isinstance(getattr(config, name), float):
            setattr(config, name, 0.0)
    model: nn.Module = getattr(transformers, class_name)(config)
    return model.double()


def llama() -> nn.Module:
    return make("LlamaConfig", "LlamaForCausalLM", **DECODER)


def gpt2() -> nn.Module:
    return make(
        "GPT2Config",
        "GPT2LMHeadModel",
        vocab_size=VOCABULARY,
        n_positions=16,
        n_embd=WIDTH,
        n_layer=4,
        n_head=2,
    )


def bert() -> nn.Module:
    return make(
        "BertConfig",
        "BertForMaskedLM",
        **{k: v for k, v in DECODER.items() if k != "num_key_value_heads"},
    )


def t5() -> nn.Module:
    return make(
        "T5Config",
        "T5ForConditionalGeneration",
        vocab_size=VOCABULARY,
        d_model=WIDTH,
        d_kv=8,
        d_ff=24,
        num_layers=2,
        num_heads=2,
        decoder_start_token_id=0,
    )


def mixtral() -> nn.Module:
    return make(
        "MixtralConfig",
        "MixtralForCausalLM",
        **DECODER,
        num_local_experts=4,
        num_experts_per_tok=2,
    )


def opt() -> nn.Module:
    return make(
        "OPTConfig",
        "OPTForCausalLM",
        vocab_size=VOCABULARY,
        hidden_size=WIDTH,
        word_embed_proj_dim=12,
        ffn_dim=24,
        num_hidden_layers=4,
        num_attention_heads=2,
        max_position_embeddings=16,
    )


def gemma() -> nn.Module:
    return make("Gemma2Config", "Gemma2ForCausalLM", **DECODER, head_dim=8)


MODELS: dict[str, Callable[[], nn.Module]] = {
    f.__name__: f for f in (llama, gpt2, bert, t5, mixtral, opt, gemma)
}


def data(steps: int, micro_batches: int, shards: int) -> list[list[list[dict[str, torch.Tensor]]]]:
    """Micro-batches by step, number and shard; padding at the end of every second sequence."""
    generator = torch.Generator().manual_seed(1)

    def batch() -> dict[str, torch.Tensor]:
        tokens = torch.randint(3, VOCABULARY, (ROWS, LENGTH), generator=generator)
        mask = torch.ones_like(tokens)
        mask[1, LENGTH - 2 :] = 0
        return {"input_ids": tokens, "attention_mask": mask, "labels": tokens.clone()}

    return [[[batch() for _ in range(shards)] for _ in range(micro_batches)] for _ in range(steps)]


Curve = list[tuple[float, float]]
"""Loss, and norm of the gradient before clipping, by step."""


def train_alone(
    model: nn.Module, steps: int, micro_batches: int, shards: int, rate: float
) -> tuple[Curve, dict[str, torch.Tensor]]:
    """Train with plain torch in one process: the curve, and the parameters."""
    optimizer = torch.optim.SGD(model.parameters(), lr=rate)
    curve = []
    for step in data(steps, micro_batches, shards):
        loss = torch.stack([model(**m).loss for micro in step for m in micro]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), float("inf"))
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve, {name: p.detach().clone() for name, p in model.named_parameters()}
