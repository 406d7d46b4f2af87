"""Small models for tests of compression after training."""

from __future__ import annotations

import torch
from torch import nn


def llama(**changes):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = {
        "vocab_size": 90, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 3,
        "num_attention_heads": 4, "num_key_value_heads": 2, "tie_word_embeddings": True,
        "max_position_embeddings": 64,
    }  # fmt: skip
    model = LlamaForCausalLM(LlamaConfig(**{**config, **changes})).eval()
    for name, parameter in model.named_parameters():
        if "norm" in name:
            nn.init.uniform_(parameter, 0.5, 2.0)
    return model


def bert():
    from transformers import BertConfig, BertModel

    torch.manual_seed(0)
    config = BertConfig(
        vocab_size=90, hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    return BertModel(config).eval()


def rows(number=6, length=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 90, (number, length), generator=generator)
    return list(ids.split(2))


class Block(nn.Module):
    """x + W2 relu(W1 norm(x)); the norm's output may be used twice."""

    def __init__(self, width=16, leak=False):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 32), nn.Linear(32, width)
        self.leak = leak

    def forward(self, x):
        normed = self.norm(x)
        return x + self.down(self.up(normed).relu()) + (normed if self.leak else 0)


class Chain(nn.Module):
    """Blocks between an embedding and a head."""

    def __init__(self, depth=3, **options):
        super().__init__()
        torch.manual_seed(1)
        self.embed = nn.Embedding(90, 16)
        self.layers = nn.ModuleList(Block(**options) for _ in range(depth))
        self.head = nn.Linear(16, 90)

    def forward(self, input_ids):
        x = self.embed(input_ids)
        for layer in self.layers:
            x = layer(x)
        return self.head(x)
