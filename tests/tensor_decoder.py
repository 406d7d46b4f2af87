"""A small decoder whose heads share keys and values, and jobs that cut it over ranks."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch.nn import functional as F

import drivetrain
from drivetrain.engine.engine import Engine

VOCABULARY, WIDTH, TOKENS, ROWS, RATE = 21, 16, 5, 2, 0.1


class Attention(nn.Module):
    """Three heads that share keys and values, so that ranks have unequal parts of them."""

    def __init__(self) -> None:
        super().__init__()
        self.size = 4
        self.q, self.k = nn.Linear(WIDTH, 12), nn.Linear(WIDTH, 4)
        self.v, self.o = nn.Linear(WIDTH, 4), nn.Linear(12, WIDTH)
        self.norm = nn.LayerNorm(self.size)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        shape = (*x.shape[:-1], -1, self.size)
        q, k, v = (p(x).view(shape).transpose(1, 2) for p in (self.q, self.k, self.v))
        k, v = (t.expand(-1, q.shape[1], -1, -1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(self.norm(q), k, v, is_causal=True)
        return self.o(mixed.transpose(1, 2).flatten(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attention, self.gate = Attention(), nn.Linear(WIDTH, 10)
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 10, bias=False), nn.Linear(10, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = x + self.attention(self.first(x))
        hidden = self.second(x)
        return x + self.down(F.silu(self.gate(hidden)) * self.up(hidden))


class Decoder(nn.Module):
    """Tokens to the mean of their cross-entropies; the head is the embedding."""

    def __init__(self, blocks: int = 2) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.tokens = nn.Embedding(VOCABULARY, WIDTH)
        nn.init.normal_(self.tokens.weight, std=0.3)
        self.blocks = nn.ModuleList(Block() for _ in range(blocks))
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, VOCABULARY, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        x = self.tokens(tokens)
        for block in self.blocks:
            x = block(x)
        return F.cross_entropy(self.head(self.norm(x)).flatten(0, 1), targets.flatten())


def make(tp: int, model: nn.Module | None = None, **config: Any) -> Engine:
    engine, *_ = drivetrain.initialize(
        model=model or Decoder().double(),
        config={
            "train_micro_batch_size_per_gpu": ROWS,
            "gradient_clipping": 0,
            "optimizer": {"type": "SGD", "params": {"lr": RATE, "momentum": 0.9}},
            "tensor_parallel": {"autotp_size": tp},
            **config,
        },
    )
    return engine


def data(number: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(number)
    tokens = torch.randint(VOCABULARY, (ROWS, TOKENS), generator=generator)
    return tokens, tokens.roll(-1, 1)


def train(engine: Engine, begin: int, end: int) -> list[float]:
    """This rank's losses; steps take the batches of all shards of data and micro-batches."""
    mesh, micro = engine.job.mesh, engine.gradient_accumulation_steps()
    losses = []
    for step in range(begin, end):
        for number in range(micro):
            shard = mesh.coordinate("dp") + mesh.size("dp") * number
            loss = engine(*data(step * mesh.size("dp") * micro + shard))
            engine.backward(loss)
            engine.step()
            losses.append(loss.item())
    return losses


def reference(begin: int, end: int, shards: int, clipping: float = 0.0) -> list[list[float]]:
    """Losses by step and shard in one process, from the first step on."""
    model = Decoder().double()
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE, momentum=0.9)
    found = []
    for step in range(end):
        losses = [model(*data(step * shards + shard)) for shard in range(shards)]
        torch.stack(losses).mean().backward()
        if clipping:
            nn.utils.clip_grad_norm_(model.parameters(), clipping)
        optimizer.step()
        optimizer.zero_grad()
        found.append([loss.item() for loss in losses])
    return found[begin:]
