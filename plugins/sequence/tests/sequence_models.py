"""Tiny models of Transformers, their batches, and training in one piece or in parts."""

from __future__ import annotations

from typing import Any

import torch

import drivetrain
from drivetrain.engine.engine import Engine

ROWS, LENGTH, STEPS, VOCABULARY = 2, 24, 3, 40


def tiny(name: str, **changes: Any) -> Any:
    """A model in float64 with large weights, so that every token matters."""
    import transformers

    torch.manual_seed(0)
    common = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2}
    common |= {"num_attention_heads": 4, "intermediate_size": 48, "initializer_range": 0.2}
    common |= changes
    if name == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, initializer_range=0.2
        )
        config.resid_pdrop = config.embd_pdrop = config.attn_pdrop = 0.0
        return transformers.GPT2LMHeadModel(config).double()
    if name == "bert":
        config = transformers.BertConfig(
            **common, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0
        )
        return transformers.BertForMaskedLM(config).double()
    if name == "mistral":
        config = transformers.MistralConfig(**common, num_key_value_heads=2, sliding_window=7)
        return transformers.MistralForCausalLM(config).double()
    if name == "qwen":
        config = transformers.Qwen2Config(**common, num_key_value_heads=1, use_sliding_window=False)
        return transformers.Qwen2ForCausalLM(config).double()
    if name == "mixtral":
        common |= {"num_key_value_heads": 2, "num_local_experts": 4, **changes}
        config = transformers.MixtralConfig(**common, experts_implementation="eager")
        return transformers.MixtralForCausalLM(config).double()
    config = transformers.LlamaConfig(**({"num_key_value_heads": 2} | common))
    return transformers.LlamaForCausalLM(config).double()


def batch(step: int, kind: str, length: int = LENGTH) -> dict[str, torch.Tensor]:
    """A batch of whole sequences: plain, padded, packed, or masked (for models like BERT)."""
    generator = torch.Generator().manual_seed(step)
    tokens = torch.randint(1, VOCABULARY, (ROWS, length), generator=generator)
    labels = tokens.clone()
    found = {"input_ids": tokens, "labels": labels}
    if kind == "padded":
        real = torch.ones_like(tokens)
        real[0, -5:] = 0
        real[1, :3] = 0
        labels[real == 0] = -100
        found["attention_mask"] = real
    if kind == "packed":
        ends = torch.tensor([[5, 11], [8, 20]])
        rows = [
            torch.cat([torch.arange(a), torch.arange(b - a), torch.arange(length - b)])
            for a, b in ends.tolist()
        ]
        found["position_ids"] = torch.stack(rows)
        labels[:, :2] = -100
    if kind == "masked":
        hidden = torch.rand(tokens.shape, generator=generator) < 0.2
        hidden[:, : length // 2] = False  # a rank may have no label
        hidden[:, -2] = True
        labels[~hidden] = -100
    return found


def engine_of(model: Any, **config: Any) -> Engine:
    """An engine with SGD."""
    engine, *_ = drivetrain.initialize(
        model=model,
        config={
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_clipping": 0.0,
            "optimizer": {"type": "SGD", "params": {"lr": 0.05}},
            **config,
        },
    )
    return engine


def train(
    engine: Engine, kind: str, shard: int = 0, length: int = LENGTH, steps: int = STEPS
) -> list[float]:
    """Losses of some steps."""
    losses = []
    for step in range(steps):
        loss = engine(**batch(step + 100 * shard, kind, length)).loss
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


def plain(
    model: Any, kind: str, length: int = LENGTH, steps: int = STEPS, optimizer: Any = None
) -> list[float]:
    """The same with nothing but torch; SGD if no optimizer is given."""
    optimizer = optimizer or torch.optim.SGD(model.parameters(), lr=0.05)
    losses = []
    for step in range(steps):
        loss = (
            model(**batch(step, kind, length), use_cache=False).loss
            if kind != "masked"
            else model(**batch(step, kind, length)).loss
        )
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    return losses
