"""A model with a ``MoE``, and the same computed by a dense loop over experts in one process."""

from __future__ import annotations

import math
from typing import Any

import torch
from drivetrain_moe import GroupedMLP, MoE
from torch import nn

WIDTH, EXPERTS, TOKENS, RATE, BALANCE = 6, 4, 12, 0.1, 0.05

KINDS: dict[str, dict[str, Any]] = {
    "top-1": {"k": 1, "use_rts": False, "min_capacity": 1},
    "top-2": {"k": 2, "top2_2nd_expert_sampling": False, "min_capacity": 1},
    "top-3": {"k": 3, "min_capacity": 1},
    "top-3 by position": {"k": 3, "priority": "position", "min_capacity": 1},
    "dropless top-1": {"k": 1, "drop_tokens": False},
    "dropless top-2": {
        "k": 2,
        "drop_tokens": False,
        "top2_2nd_expert_sampling": False,
    },
    "residual": {"k": 1, "use_rts": False, "use_residual": True, "min_capacity": 1},
    "shared": {"k": 1, "use_rts": False, "use_residual": True, "drop_tokens": False},
    "sigmoid in groups": {
        "k": 2,
        "score": "sigmoid",
        "groups": (2, 1),
        "scale": 2.5,
        "drop_tokens": False,
        "top2_2nd_expert_sampling": False,
    },
    "experts choose": {"k": 2, "chooses": "expert", "min_capacity": 1},
    "grouped": {"k": 2, "drop_tokens": False, "top2_2nd_expert_sampling": False},
    "idle experts": {"k": 1, "drop_tokens": False},
}


class Expert(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 8), nn.Linear(8, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down(torch.tanh(self.up(x)))


class Model(nn.Module):
    """Tokens of one rank, with the same parameters everywhere."""

    def __init__(self, kind: str, ep: int = 1, **changes: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        options = {**KINDS[kind], **changes}
        expert = GroupedMLP(EXPERTS, WIDTH, 8, bias=True) if kind == "grouped" else Expert()
        self.stem = nn.Linear(3, WIDTH)
        if kind == "shared":
            options["shared_expert"] = Expert()
        self.moe = MoE(WIDTH, expert, EXPERTS, ep, **options)
        self.head = nn.Linear(WIDTH, 1)
        generator = torch.Generator().manual_seed(1)
        for parameter in self.parameters():  # copies of an expert would all be equal
            parameter.data = torch.randn(parameter.shape, generator=generator) / 2
        if kind == "idle experts":  # all tokens to the first expert
            self.moe.gate.weight.data.zero_()[0, 0] = 3.0
            self.stem.bias.data[0] = 9.0
        if self.moe.bias is not None:
            self.moe.bias = torch.tensor([0.3, -0.2, 0.1, 0.0])
        self.double()

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.stem(x))
        out, balance, _ = self.moe(hidden)
        return self.loss(hidden + out, y) + BALANCE * balance

    def loss(self, hidden: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        # A rank without tokens has a loss of 0, with a graph.
        return (self.head(hidden).squeeze(-1) - y).square().sum() / TOKENS


class Dense(Model):
    """Every expert computes every token, and a matrix says with which weight."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        hidden = torch.tanh(self.stem(x))
        weights, balance = dense_weights(self.moe, hidden)
        out = sum(weights[:, e : e + 1] * self.expert(e, hidden) for e in range(EXPERTS))
        if self.moe.residual is not None:
            share = self.moe.coefficient(hidden).softmax(-1)
            out = out * share[:, :1] + self.moe.residual(hidden) * share[:, 1:]
        if self.moe.shared_expert is not None:
            out = out + self.moe.shared_expert(hidden)
        return self.loss(hidden + out, y) + BALANCE * balance

    def expert(self, number: int, x: torch.Tensor) -> torch.Tensor:
        experts = self.moe.experts
        if not isinstance(experts, GroupedMLP):
            return experts[str(number)](x)
        gate, up = (x @ experts.up[number] + experts.up_bias[number]).chunk(2, -1)
        return (gate * torch.sigmoid(gate) * up) @ experts.down[number] + experts.down_bias[number]


def dense_weights(moe: MoE, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Weight of each expert for each token, [S, E], and the balancing loss, with plain masks."""
    r, tokens = moe.routing, len(x)
    logits = x @ moe.gate.weight.t()
    if r.score == "sigmoid":
        scores = 1 / (1 + torch.exp(-logits))
    else:
        scores = torch.exp(logits) / torch.exp(logits).sum(-1, keepdim=True)
    factor = r.capacity_factor * (r.k if r.k > 1 else 1)
    capacity = max(math.ceil(tokens / EXPERTS * factor), r.min_capacity)
    chosen = torch.zeros(tokens, EXPERTS, dtype=x.dtype)
    if r.chooses == "expert":
        for expert in range(EXPERTS):
            best = sorted(range(tokens), key=lambda t: -scores[t, expert].item())[:capacity]
            chosen[best, expert] = 1
        return chosen * scores, scores.sum() * 0
    order = choices_in_order(moe, scores)
    counted = [entry for entry in order if r.k != 2 or entry[0] == 0]
    share = torch.zeros(EXPERTS, dtype=x.dtype)
    for _, _, expert in counted:
        share[expert] += 1 / max(1, tokens)
    part = scores / scores.sum(-1, keepdim=True) if r.score == "sigmoid" else scores
    balance = EXPERTS * (part.sum(0) / max(1, tokens) * share).sum() / (r.k if r.k > 2 else 1)
    if r.k > 2 and r.drop_priority == "probability":
        order.sort(key=lambda entry: -scores[entry[1], entry[2]].item())
    room = [capacity] * EXPERTS
    for _, token, expert in order:
        if not r.drops or room[expert]:
            room[expert] -= 1
            chosen[token, expert] = 1
    weights = chosen * scores
    if r.k > 1:
        total = weights.sum(-1, keepdim=True)
        weights = weights / torch.where(total > 0, total, 1.0)
    return weights * r.scale, balance


def choices_in_order(moe: MoE, scores: torch.Tensor) -> list[tuple[int, int, int]]:
    """(Choice, token, expert), first choices first."""
    r = moe.routing
    order: list[tuple[int, int, int]] = []  # (choice, token, expert)
    for token in range(len(scores)):
        ranked = scores[token].detach().clone()
        if moe.bias is not None:
            ranked += moe.bias
        if r.groups > 1:
            groups = ranked.view(r.groups, -1)
            best = max(range(r.groups), key=lambda g: groups[g].topk(2).values.sum().item())
            for group in range(r.groups):
                if group != best:
                    groups[group] = -math.inf
        for choice in range(r.k):
            expert = int(ranked.argmax())
            ranked[expert] = -math.inf
            order.append((choice, token, expert))
    return sorted(order)


def tokens(step: int, shard: int, count: int = TOKENS) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(100 * step + shard)
    x = torch.randn(count, 3, generator=generator, dtype=torch.float64)
    return x, torch.sin(3 * x.sum(-1))


def count_of(kind: str, shard: int) -> int:
    """Tokens of a data shard: they differ, and a shard has one, or none."""
    return (TOKENS, 1, 7, 0)[shard] if kind.startswith("dropless") else TOKENS


def train_dense(
    kind: str, steps: int, shards: int, clipping: float = 0.0
) -> tuple[list[float], dict[str, torch.Tensor]]:
    """Train in one process: losses, and parameters by the names that they have everywhere.

    Args:
        clipping: largest norm of a gradient, which has to be reached at each step; 0 for none.
    """
    model, losses = Dense(kind), []
    optimizer = torch.optim.SGD(model.parameters(), lr=RATE)
    for step in range(steps):
        parts = [model(*tokens(step, s, count_of(kind, s))) for s in range(shards)]
        loss = torch.stack(parts).mean()
        optimizer.zero_grad()
        loss.backward()
        if clipping:
            assert nn.utils.clip_grad_norm_(model.parameters(), clipping) > clipping
        optimizer.step()
        losses.append(loss.item())
    return losses, {name: p.detach() for name, p in model.named_parameters()}
