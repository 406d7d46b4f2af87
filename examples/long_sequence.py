"""Train a model on sequences that ranks share: the quickstart's GPT, or a Llama of Transformers.

    drivetrain run --nproc 2 examples/long_sequence.py --share 2
    drivetrain run --nproc 2 examples/long_sequence.py --share 2 --model llama

With ``--share 1`` and one rank the losses are the same.
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from gpt import BYTES, GPT, Attention, rotate
from text_data import standard_library
from torch import nn

import drivetrain


class SharedAttention(Attention):
    """The quickstart's attention through ``drivetrain.attention``."""

    def forward(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[batch, length, width] -> the same shape."""
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        q, k = (rotate(F.rms_norm(part, part.shape[-1:]), *rotation) for part in (q, k))
        mixed = drivetrain.attention(self, q, k, v, causal=True)  # [batch, length, heads, ...]
        return self.out(mixed.reshape(batch, length, width))


class SharedGPT(GPT):
    """The quickstart's GPT, told where the tokens are that it is given."""

    def __init__(self, context: int, layers: int, width: int, heads: int) -> None:
        super().__init__(context, layers, width, heads)
        for block in self.blocks:
            block.attention = SharedAttention(width, heads)

    def forward(
        self,
        tokens: torch.Tensor,
        targets: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """The mean loss of these tokens, in nats per byte."""
        length = tokens.shape[1]
        places = torch.arange(length) if position_ids is None else position_ids[0]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, (self.cosine[places], self.sine[places]))
        logits: torch.Tensor = self.lm_head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def make(model: str, context: int) -> nn.Module:
    """The model, with the same values on every rank."""
    torch.manual_seed(0)
    if model == "gpt":
        return SharedGPT(context, layers=2, width=64, heads=4)
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=BYTES,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=context,
    )
    return LlamaForCausalLM(config)


def main() -> None:
    """Train, and print the losses of the whole sequences."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", choices=("gpt", "llama"), default="gpt")
    parser.add_argument("--share", type=int, default=1, help="ranks that share a sequence")
    parser.add_argument("--context", type=int, default=256, help="bytes of a sequence")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args()
    engine, *_ = drivetrain.initialize(
        model=make(options.model, options.context),
        config={
            "train_micro_batch_size_per_gpu": 4,
            "optimizer": {"type": "AdamW", "params": {"lr": 3e-3}},
            "sequence_parallel_size": options.share,
            "sequence_parallel": {"mlp_tile": 64},
        },
    )
    text = torch.frombuffer(bytearray(standard_library()), dtype=torch.uint8).long()
    data = torch.Generator().manual_seed(engine.job.mesh.coordinate("dp"))
    for step in range(1, options.steps + 1):
        starts = torch.randint(len(text) - options.context - 1, (4,), generator=data)
        windows = torch.stack([text[start : start + options.context + 1] for start in starts])
        # Whole sequences: the engine gives each rank its part.
        batch = (windows[:, :-1], windows[:, 1:])
        if options.model == "llama":
            batch = {"input_ids": windows[:, :-1], "labels": windows[:, :-1]}
        loss = engine.train_batch(iter([batch]))
        if engine.job.rank == 0:
            print(f"step {step}: loss {loss.item():.3f}")
    engine.destroy()


if __name__ == "__main__":
    main()
