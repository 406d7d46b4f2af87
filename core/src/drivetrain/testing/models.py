"""Small seeded models whose ``forward(inputs, targets)`` is a mean loss."""

from __future__ import annotations

import torch
import torch.nn.functional as F  # noqa: N812 - torch's own convention
from torch import nn


class MLP(nn.Module):
    """Three linear layers and a mean squared error.

    Args:
        width: of the hidden layers.
        features: of inputs and targets.
    """

    def __init__(self, width: int = 32, features: int = 8) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(features, width),
            nn.GELU(),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Linear(width, features),
        )

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Inputs and targets [batch, features] -> scalar."""
        outputs: torch.Tensor = self.layers(inputs)
        return F.mse_loss(outputs.float(), targets.float())


class Block(nn.Module):
    """A pre-norm transformer block with causal attention."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.heads = heads
        self.dropout = dropout
        self.attention_norm = nn.LayerNorm(width)
        self.qkv = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)
        self.mlp_norm = nn.LayerNorm(width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """[batch, sequence, width] -> the same shape."""
        batch, sequence, width = x.shape
        qkv = self.qkv(self.attention_norm(x)).view(batch, sequence, 3, self.heads, -1)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)
        attended = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(attended.transpose(1, 2).reshape(batch, sequence, width))
        hidden = self.down(F.gelu(self.up(self.mlp_norm(x))))
        return x + F.dropout(hidden, self.dropout, self.training)


class TinyGPT(nn.Module):
    """A decoder-only language model and its cross entropy.

    Args:
        vocabulary: number of tokens.
        width: of the residual stream.
        layers: number of blocks.
        heads: of attention.
        positions: longest sequence.
        tied: whether the head is the transposed embedding.
        dropout: after each block's MLP.
    """

    def __init__(
        self,
        vocabulary: int = 64,
        width: int = 32,
        layers: int = 2,
        *,
        heads: int = 4,
        positions: int = 32,
        tied: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(positions, width)
        self.blocks = nn.ModuleList(Block(width, heads, dropout) for _ in range(layers))
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            nn.init.normal_(self.tokens.weight, std=0.02)
            self.head.weight = self.tokens.weight

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Token ids [batch, sequence], next ids of the same shape -> scalar."""
        x = self.tokens(inputs) + self.positions(
            torch.arange(inputs.shape[1], device=inputs.device)
        )
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())


class ConvNet(nn.Module):
    """Two convolutions with batch norm and a classifier; the norms have buffers."""

    def __init__(self, channels: int = 8, classes: int = 4) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(3, channels, 3, padding=1),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, channels, 3, stride=2, padding=1),
            nn.GroupNorm(2, channels),
            nn.ReLU(),
            nn.AdaptiveAvgPool2d(1),
            nn.Flatten(),
        )
        self.classifier = nn.Linear(channels, classes)

    def forward(self, inputs: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        """Images [batch, 3, height, width], classes [batch] -> scalar."""
        logits = self.classifier(self.features(inputs))
        return F.cross_entropy(logits.float(), targets)


def mlp() -> nn.Module:
    """An :class:`MLP` of 1.6 thousand parameters."""
    torch.manual_seed(1)
    return MLP()


def tiny_gpt() -> nn.Module:
    """A :class:`TinyGPT` of 30 thousand parameters, its head untied."""
    torch.manual_seed(2)
    return TinyGPT()


def tied_gpt() -> nn.Module:
    """A :class:`TinyGPT` whose head is its embedding."""
    torch.manual_seed(3)
    return TinyGPT(tied=True)


def conv_net() -> nn.Module:
    """A :class:`ConvNet`."""
    torch.manual_seed(4)
    return ConvNet()
