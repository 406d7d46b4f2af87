"""Tiny models of Transformers in float64, and training with listed blocks or with their mask."""

from __future__ import annotations

from typing import Any

import torch
from drivetrain_sparse_attention import SparseAttentionSection
from drivetrain_sparse_attention.layouts import sparsity_of

import drivetrain

ROWS, LENGTH, STEPS, VOCABULARY = 2, 45, 3, 40
CAUSAL = ("llama", "gpt2", "qwen", "mistral")


def tiny(name: str, **changes: Any) -> Any:
    """A model with large weights, so that every token matters."""
    import transformers

    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.2}
    common |= changes
    if name == "gpt2":
        dropout = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
        sizes = {"vocab_size": VOCABULARY, "n_embd": 32, "n_layer": 2, "n_head": 4}
        config = transformers.GPT2Config(**sizes, **dropout | changes, initializer_range=0.2)
        return transformers.GPT2LMHeadModel(config).double()
    if name == "bert":
        dropout = {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
        config = transformers.BertConfig(**dropout | common)
        return transformers.BertForMaskedLM(config).double()
    if name == "mistral":
        config = transformers.MistralConfig(**common, num_key_value_heads=2, sliding_window=7)
        return transformers.MistralForCausalLM(config).double()
    if name == "qwen":
        config = transformers.Qwen2Config(**common, num_key_value_heads=1, use_sliding_window=False)
        return transformers.Qwen2ForCausalLM(config).double()
    config = transformers.LlamaConfig(**({"num_key_value_heads": 2} | common))
    return transformers.LlamaForCausalLM(config).double()


def batch(step: int, kind: str, length: int = LENGTH) -> dict[str, Any]:
    """Sequences: plain, padded at both ends, or packed."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, VOCABULARY, (ROWS, length), generator=generator)
    found = {"input_ids": tokens, "labels": tokens.clone()}
    if kind == "padded":
        real = torch.ones_like(tokens)
        real[0, -6:] = 0
        real[1, :3] = 0
        found["labels"][real == 0] = -100
        found["labels"][1, 3] = -100  # that padding would predict
        found["attention_mask"] = real
    if kind == "packed":
        rows = [
            torch.cat([torch.arange(a), torch.arange(length - a)])
            for a in (length // 3, length // 2)
        ]
        found["position_ids"] = torch.stack(rows)
    return found


def train(engine: Any, kind: str, shard: int = 0, length: int = LENGTH) -> list[float]:
    """Losses of some steps of an engine."""
    losses = []
    for step in range(STEPS):
        given = batch(step + 100 * shard, kind, length)
        if kind == "packed":
            given["use_cache"] = False  # with a cache Transformers takes rows for one sequence
        loss = engine(**given).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def engine_of(model: Any, **config: Any) -> Any:
    """An engine with SGD."""
    optimizer = {"type": "SGD", "params": {"lr": 0.05}}
    base = {"train_micro_batch_size_per_gpu": ROWS, "gradient_clipping": 0.0}
    engine, *_ = drivetrain.initialize(
        model=model, config={**base, "optimizer": optimizer, **config}
    )
    return engine


def plain(model: Any, name: str, kind: str, settings: dict[str, Any], length: int = LENGTH) -> Any:
    """The same training with the whole mask and nothing but torch: losses."""
    optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(STEPS):
        given = batch(step, kind, length)
        given["attention_mask"] = mask_of(name, kind, given, settings, length)
        loss = model(**given, **({"use_cache": False} if name in CAUSAL else {})).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses


def mask_of(
    name: str, kind: str, given: dict[str, torch.Tensor], settings: dict[str, Any], length: int
) -> torch.Tensor:
    """What tokens may see, [b, 1 or h, s, s], from the layout's definition."""
    section = SparseAttentionSection(**settings)
    config = sparsity_of(section, 4)
    blocks = -(-length // section.block)
    layout = config.make_layout(blocks * section.block).bool()
    wide = layout.repeat_interleave(section.block, 1).repeat_interleave(section.block, 2)
    seen = wide[None, :, :length, :length].expand(ROWS, -1, -1, -1).clone()
    if name in CAUSAL:
        seen = seen.tril()
    if name == "mistral":
        place = torch.arange(length)
        seen = seen & (place[:, None] - place < 7)
    if kind == "padded":
        # Queries of padding see themselves, so that plain attention has no empty rows.
        real = given["attention_mask"].bool()
        seen = seen & real[:, None, None] | torch.eye(length, dtype=torch.bool)
    if kind == "packed":
        document = (given["position_ids"] == 0).cumsum(1)
        seen = seen & (document[:, None, :, None] == document[:, None, None])
    return seen
