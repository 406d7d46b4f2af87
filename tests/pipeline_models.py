"""A language model with tied embedding and head, and how one process trains it."""

from __future__ import annotations

import torch
from torch import nn

VOCABULARY, WIDTH, BLOCKS, LENGTH, ROWS = 20, 8, 4, 5, 2

Curve = list[tuple[float, float]]
"""Loss, and norm of the gradient before clipping, by step."""


class Block(nn.Module):
    """A residual block; what it adds is masked."""

    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(WIDTH)
        self.up = nn.Linear(WIDTH, 2 * WIDTH)
        self.down = nn.Linear(2 * WIDTH, WIDTH)

    def forward(self, x: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Return what comes out for ``x`` [b, s, width] with ``mask`` [b, s, 1]."""
        result: torch.Tensor = x + self.down(torch.tanh(self.up(self.norm(x)))) * mask
        return result


class TiedModel(nn.Module):
    """Tokens [b, s] -> loss of predicting them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(VOCABULARY, WIDTH)
        self.positions = nn.Embedding(LENGTH, WIDTH)  # whose weight is read, without a call
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.embedding.weight

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        """Return the mean cross-entropy, 0-d."""
        mask = (tokens % 3 > 0).unsqueeze(-1).to(self.norm.weight.dtype)
        x = self.embedding(tokens) + self.positions.weight
        for block in self.blocks:
            x = block(x, mask)
        logits = self.head(self.norm(x))
        return nn.functional.cross_entropy(logits.flatten(0, 1).float(), tokens.flatten())


def data(steps: int, micro_batches: int, shards: int) -> list[list[list[torch.Tensor]]]:
    """Micro-batches by step, number and shard."""
    generator = torch.Generator().manual_seed(1)

    def tokens() -> torch.Tensor:
        return torch.randint(0, VOCABULARY, (ROWS, LENGTH), generator=generator)

    return [[[tokens() for _ in range(shards)] for _ in range(micro_batches)] for _ in range(steps)]


def train_alone(
    steps: int, micro_batches: int, shards: int, rate: float, clipping: float
) -> tuple[Curve, dict[str, torch.Tensor]]:
    """Train with plain torch, SGD with momentum: the curve, and the parameters."""
    model, curve = TiedModel(), []
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9)
    for step in data(steps, micro_batches, shards):
        loss = torch.stack([model(tokens) for micro in step for tokens in micro]).mean()
        optimizer.zero_grad()
        loss.backward()
        norm = nn.utils.clip_grad_norm_(model.parameters(), clipping or float("inf"))
        optimizer.step()
        curve.append((loss.item(), norm.item()))
    return curve, {name: p.detach() for name, p in model.named_parameters()}
