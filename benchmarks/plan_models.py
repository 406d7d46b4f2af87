"""Models of plan.py: functions without arguments, each makes one."""

from __future__ import annotations

import torch
from torch import nn
from torch.nn.functional import cross_entropy

from drivetrain.testing.models import TinyGPT


def TINY() -> nn.Module:  # noqa: N802 - one of the names on the command line
    """A model of no size, whose steps load what steps load."""
    return TinyGPT(vocabulary=100, width=32, layers=4, positions=8)


def gpt() -> nn.Module:
    """29 million parameters: eight blocks of width 512."""
    return TinyGPT(vocabulary=4096, width=512, layers=8, heads=8, positions=512)


def wide() -> nn.Module:
    """29 million parameters: two blocks of width 1024."""
    return TinyGPT(vocabulary=2048, width=1024, layers=2, heads=8, positions=512)


def deep() -> nn.Module:
    """13 million parameters: sixteen blocks of width 256."""
    return TinyGPT(vocabulary=1000, width=256, layers=16, heads=4, positions=256)


def middling() -> nn.Module:
    """17 million parameters: six blocks of width 384, and a vocabulary of 8,192."""
    return TinyGPT(vocabulary=8192, width=384, layers=6, heads=6, positions=256)


def broad() -> nn.Module:
    """58 million parameters: two blocks of width 1536."""
    return TinyGPT(vocabulary=512, width=1536, layers=2, heads=12, positions=128)


class Encoder(nn.Module):
    """Torch's encoder, which sees all tokens and has dropout, and says the next one all the same.

    Args:
        vocabulary: number of tokens.
        width: channels.
        layers: number of blocks.
    """

    def __init__(self, vocabulary: int, width: int, layers: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(vocabulary, width)
        block = nn.TransformerEncoderLayer(width, 8, 4 * width, batch_first=True)
        self.blocks = nn.TransformerEncoder(block, layers, enable_nested_tensor=False)
        self.head = nn.Linear(width, vocabulary)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """[batch, length] tokens and targets -> mean loss."""
        logits = self.head(self.blocks(self.embed(tokens)))
        return cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


def encoder() -> nn.Module:
    """20 million parameters: five blocks of width 512."""
    return Encoder(vocabulary=4000, width=512, layers=5)


def billion() -> nn.Module:
    """1.3 billion parameters: 24 blocks of width 2048, as GPT-3 XL (arXiv:2005.14165)."""
    return TinyGPT(vocabulary=50_257, width=2048, layers=24, heads=16, positions=2048)
