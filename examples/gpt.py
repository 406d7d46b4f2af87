"""A small GPT over bytes, in plain torch: nothing here knows of Drivetrain."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import nn

BYTES = 256
"""Size of the vocabulary: every byte is a token."""


class Attention(nn.Module):
    """Causal self-attention with rotary positions (Su et al. 2021) and normalised heads.

    Args:
        width: channels.
        heads: how many heads share them.
    """

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width, bias=False)

    def forward(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[batch, length, width] -> the same shape."""
        batch, length, width = x.shape
        qkv = self.qkv(x).view(batch, length, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4)  # each [batch, heads, length, width per head]
        q, k = (rotate(F.rms_norm(part, part.shape[-1:]), *rotation) for part in (q, k))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """One layer: attention, then a two-layer perceptron, each added to its input."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.attention_norm = nn.RMSNorm(width)
        self.attention = Attention(width, heads)
        self.mlp_norm = nn.RMSNorm(width)
        self.mlp = nn.Sequential(
            nn.Linear(width, 4 * width, bias=False),
            nn.GELU(),
            nn.Linear(4 * width, width, bias=False),
        )
        nn.init.zeros_(self.attention.out.weight)  # every layer begins as the identity
        nn.init.zeros_(self.mlp[2].weight)

    def forward(self, x: torch.Tensor, rotation: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
        """[batch, length, width] -> the same shape."""
        x = x + self.attention(self.attention_norm(x), rotation)
        return x + self.mlp(self.mlp_norm(x))


class GPT(nn.Module):
    """Predicts the next byte from up to ``context`` bytes before it.

    Args:
        context: longest sequence, in bytes.
        layers: number of blocks.
        width: channels, a multiple of twice ``heads``.
        heads: attention heads per block.
    """

    def __init__(self, context: int, layers: int, width: int, heads: int) -> None:
        super().__init__()
        self.context = context
        self.embed = nn.Embedding(BYTES, width)
        self.blocks = nn.ModuleList(Block(width, heads) for _ in range(layers))
        self.norm = nn.RMSNorm(width)
        self.lm_head = nn.Linear(width, BYTES, bias=False)
        nn.init.normal_(self.embed.weight, std=0.5)
        nn.init.zeros_(self.lm_head.weight)  # the first guess is 8 bits per byte
        cosine, sine = rotation_table(context, width // heads)
        self.register_buffer("cosine", cosine, persistent=False)
        self.register_buffer("sine", sine, persistent=False)

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor | None = None) -> torch.Tensor:
        """Logits of the next byte, or the loss against ``targets``.

        Args:
            tokens: [batch, length], integers below 256.
            targets: [batch, length], the byte that follows each token.

        Returns:
            Logits [batch, length, 256]; with ``targets`` the mean loss in nats per byte, 0-d.
        """
        length = tokens.shape[1]
        x = self.embed(tokens)
        for block in self.blocks:
            x = block(x, (self.cosine[:length], self.sine[:length]))
        logits: torch.Tensor = self.lm_head(self.norm(x))
        if targets is None:
            return logits
        return F.cross_entropy(logits.flatten(0, 1).float(), targets.flatten())

    @torch.no_grad()
    def write(self, prompt: bytes, length: int, temperature: float = 0.8, seed: int = 0) -> bytes:
        """Continue ``prompt`` by ``length`` bytes.

        Args:
            prompt: at least one byte.
            length: how many bytes to add.
            temperature: above 0; small values stay close to the likeliest byte.
            seed: decides the draws.
        """
        device = self.embed.weight.device
        generator = torch.Generator().manual_seed(seed)
        text = list(prompt)
        for _ in range(length):
            tokens = torch.tensor([text[-self.context :]], device=device)
            logits = self(tokens)[0, -1].float().cpu() / temperature
            text.append(int(torch.multinomial(logits.softmax(0), 1, generator=generator)))
        return bytes(text)


def small() -> GPT:
    """What train_gpt.py trains unless it is told otherwise: 0.85 million parameters."""
    return GPT(context=256, layers=4, width=128, heads=4)


def rotation_table(length: int, channels: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine, each [length, channels / 2], of the angle of every position and pair."""
    speeds = 10_000.0 ** -torch.linspace(0, 1, channels // 2)
    angles = torch.outer(torch.arange(length), speeds)
    return angles.cos(), angles.sin()


def rotate(x: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor) -> torch.Tensor:
    """Turn each pair of channels of ``x`` [..., length, channels] by its position's angle."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((first * cosine - second * sine, first * sine + second * cosine), dim=-1)
