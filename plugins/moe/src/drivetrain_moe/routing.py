"""Which expert computes which token, and with which weight.

Shapes: S tokens, E experts, k choices of a token. Scores and weights are in float32 at least.

- top-1 with capacity and random selection: Fedus et al. 2021, "Switch Transformers"; top-2:
  Lepikhin et al. 2020, "GShard"; z-loss: Zoph et al. 2022, "ST-MoE".
- sigmoid scores, groups, balance by a bias: DeepSeek-AI 2024, "DeepSeek-V3", 2.1.2.
- expert choice: Zhou et al. 2022, "Mixture-of-Experts with Expert Choice Routing".
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Literal

import torch
from torch.nn import functional

Score = Literal["softmax", "sigmoid"]
Priority = Literal["random", "position", "probability"]
Noise = Literal["Jitter", "RSample"]

JITTER = 1e-2
"""Half the width of the factor that "Jitter" multiplies inputs of the router by."""


@dataclass(frozen=True)
class Routing:
    """How tokens find experts.

    Args:
        experts: how many there are.
        k: experts of a token.
        score: how logits become scores.
        normalise: whether weights of a token add up to 1; by default for k > 1.
        scale: of the weights.
        groups: the experts are in so many groups, of which a token uses some; 1 for none.
        groups_used: that many.
        drops: whether experts take no more than their capacity.
        capacity_factor: of the even share of an expert.
        min_capacity: tokens that an expert takes at least.
        priority: who stays where an expert has too many; by default at random for k = 1, by
            position for k = 2 and by probability above.
        noise: in training: "Jitter" of inputs, or "RSample", Gumbel noise on the first choice.
        second_noise: Gumbel noise on the second choice in training, for k = 2.
        chooses: whether tokens choose experts, or experts choose tokens.
    """

    experts: int
    k: int = 1
    score: Score = "softmax"
    normalise: bool | None = None
    scale: float = 1.0
    groups: int = 1
    groups_used: int = 1
    drops: bool = True
    capacity_factor: float = 1.0
    min_capacity: int = 4
    priority: Priority | None = None
    noise: Noise | None = None
    second_noise: bool = False
    chooses: Literal["token", "expert"] = "token"

    def capacity(self, tokens: int) -> int:
        """Tokens that an expert takes at most, of ``tokens``."""
        factor = self.capacity_factor * (self.k if self.k > 1 or self.chooses == "expert" else 1)
        return max(math.ceil(tokens / self.experts * factor), self.min_capacity)

    @property
    def drop_priority(self) -> Priority:
        """Who stays where an expert has too many tokens."""
        if self.priority is not None:
            return self.priority
        return "random" if self.k == 1 else "position" if self.k == 2 else "probability"

    @property
    def is_normalised(self) -> bool:
        """Whether weights of a token add up to 1."""
        return self.k > 1 if self.normalise is None else self.normalise


@dataclass(frozen=True)
class Routed:
    """Which tokens go where, in order of experts.

    Args:
        token: [A] number of the token of each assignment.
        expert: [A] its expert, ascending.
        weight: [A] of the expert's output, with a graph.
        wanted: [E] tokens that chose each expert, before any were dropped.
        dropped: 0-d, assignments that were dropped.
        balance: 0-d, the balancing loss, with a graph.
        z: 0-d, mean squared logsumexp of the logits, with a graph.
    """

    token: torch.Tensor
    expert: torch.Tensor
    weight: torch.Tensor
    wanted: torch.Tensor
    dropped: torch.Tensor
    balance: torch.Tensor
    z: torch.Tensor

    def ordered(self, order: torch.Tensor) -> Routed:
        """The assignments with the numbers ``order``."""
        assignments = (self.token[order], self.expert[order], self.weight[order])
        return replace(self, **dict(zip(("token", "expert", "weight"), assignments, strict=True)))

    def between(self, first: int, end: int) -> Routed:
        """The assignments of tokens from ``first`` to before ``end``, numbered from ``first``."""
        found = self.ordered(((self.token >= first) & (self.token < end)).nonzero().squeeze(1))
        return replace(found, token=found.token - first)


def jittered(x: torch.Tensor) -> torch.Tensor:
    """``x`` times uniform noise around 1."""
    return x * torch.empty_like(x).uniform_(1 - JITTER, 1 + JITTER)


def route(
    logits: torch.Tensor,
    routing: Routing,
    *,
    training: bool,
    bias: torch.Tensor | None = None,
    used: torch.Tensor | None = None,
    together: Callable[[torch.Tensor], torch.Tensor] = lambda scores: scores,
) -> Routed:
    """Assign tokens to experts.

    Args:
        logits: [S, E].
        routing: how.
        training: whether noise is added.
        bias: [E], added to scores for the choice alone.
        used: [S], 0 for tokens that no expert computes; ``None`` for all.
        together: returns scores as they are, for weights alone; where ranks share out equal tokens,
            it gathers their gradients.
    """
    scores = logits.softmax(-1) if routing.score == "softmax" else logits.sigmoid()
    z = logits.logsumexp(-1).square().sum() / max(1, logits.shape[0])
    if routing.chooses == "expert":
        return _experts_choose(scores, together(scores), routing, z, used)
    index = _choices(scores, logits, routing, training, bias)
    # Choice-major: all first choices come before all second ones.
    expert, token = index.t().reshape(-1), torch.arange(len(index), device=index.device)
    token = token.repeat(routing.k)
    taken = torch.ones_like(expert, dtype=torch.bool)
    if used is not None:
        taken = used.reshape(-1).bool()[token]
    balance = _balance(scores, expert, taken, routing)
    gate = together(scores).gather(1, index).t().reshape(-1)
    wanted = torch.bincount(expert[taken], minlength=routing.experts)
    kept = taken & _fits(expert, gate, taken, routing, len(index)) if routing.drops else taken
    order = expert.masked_fill(~kept, routing.experts).argsort(stable=True)[: int(kept.sum())]
    weight = torch.where(kept, gate, 0.0)
    if routing.is_normalised:
        total = weight.view(routing.k, -1).sum(0)
        smallest = torch.finfo(weight.dtype).eps if routing.score == "softmax" else 1e-20
        weight = weight / total.clamp(min=smallest).repeat(routing.k)
    return Routed(
        token[order],
        expert[order],
        (weight * routing.scale)[order],
        wanted,
        taken.sum() - len(order),
        balance,
        z,
    )


def _choices(
    scores: torch.Tensor,
    logits: torch.Tensor,
    routing: Routing,
    training: bool,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """The experts of each token, best first, [S, k]."""
    with torch.no_grad():
        ranked = scores if bias is None else scores + bias
        if routing.groups > 1:
            ranked = _limited(ranked, routing)
        if routing.k == 1 and training and routing.noise == "RSample":
            return (logits + _gumbel(logits)).argmax(-1, keepdim=True)
        if routing.k == 2 and training and routing.second_noise:
            first = ranked.argmax(-1, keepdim=True)
            rest = (logits + _gumbel(logits)).scatter(1, first, -math.inf)
            return torch.cat([first, rest.argmax(-1, keepdim=True)], 1)
        return ranked.topk(routing.k, dim=-1).indices


def _limited(ranked: torch.Tensor, routing: Routing) -> torch.Tensor:
    """Leave the experts of a token's best groups, by the sum of the two best of each."""
    grouped = ranked.view(len(ranked), routing.groups, -1)
    best = grouped.topk(min(2, grouped.shape[-1]), dim=-1).values.sum(-1)
    if routing.score == "softmax":
        best = grouped.amax(-1)
    chosen = torch.zeros_like(best, dtype=torch.bool)
    chosen.scatter_(1, best.topk(routing.groups_used, dim=-1).indices, True)
    return grouped.masked_fill(~chosen.unsqueeze(-1), -math.inf).view_as(ranked)


def _balance(
    scores: torch.Tensor, expert: torch.Tensor, taken: torch.Tensor, routing: Routing
) -> torch.Tensor:
    """E * sum over experts of mean score * share of the choices; of top-2, of the first ones."""
    tokens = max(1, len(scores))
    counted = slice(0, len(scores)) if routing.k == 2 else slice(None)
    chosen = torch.bincount(expert[counted][taken[counted]], minlength=routing.experts)
    share = chosen.to(scores.dtype) / tokens
    if routing.score == "sigmoid":
        scores = scores / scores.sum(-1, keepdim=True)
    total = (scores.sum(0) / tokens * share).sum() * routing.experts
    return total if routing.k <= 2 else total / routing.k


def _fits(
    expert: torch.Tensor, gate: torch.Tensor, taken: torch.Tensor, routing: Routing, tokens: int
) -> torch.Tensor:
    """Whether each assignment is among those that its expert has room for."""
    capacity = routing.capacity(tokens)
    with torch.no_grad():
        if routing.drop_priority == "position":
            order = torch.arange(len(expert), device=expert.device)
        else:
            by = gate if routing.drop_priority == "probability" else torch.rand_like(gate)
            order = by.argsort(descending=True, stable=True)
        waiting = expert.masked_fill(~taken, routing.experts)
        order = order[waiting[order].argsort(stable=True)]
        counts = torch.bincount(waiting, minlength=routing.experts + 1)
        first = counts.cumsum(0) - counts
        place = torch.arange(len(order), device=order.device) - first[waiting[order]]
        fits = torch.empty_like(taken)
        fits[order] = place < capacity
    return fits


def _experts_choose(
    scores: torch.Tensor,
    gate: torch.Tensor,
    routing: Routing,
    z: torch.Tensor,
    used: torch.Tensor | None,
) -> Routed:
    """Each expert takes the tokens that score it highest, as many as its capacity."""
    tokens = len(scores)
    room = min(routing.capacity(tokens), tokens)
    ranked = scores.detach()
    if used is not None:
        ranked = ranked.masked_fill(~used.reshape(-1, 1).bool(), -1.0)
    best = ranked.t().topk(room, dim=-1)
    kept = (best.values >= 0).reshape(-1)
    token = best.indices.reshape(-1)[kept]
    expert = torch.arange(routing.experts, device=token.device).repeat_interleave(room)[kept]
    weight = gate[token, expert] * routing.scale
    none = scores.sum() * 0
    wanted = torch.bincount(expert, minlength=routing.experts)
    return Routed(token, expert, weight, wanted, torch.zeros_like(wanted[:1]).sum(), none, z)


def _gumbel(like: torch.Tensor) -> torch.Tensor:
    return -torch.empty_like(like).exponential_().log()


def router_logits(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """``x [S, d] @ weight [E, d].T`` in float32 at least, whatever autocast says."""
    dtype = torch.promote_types(x.dtype, torch.float32)
    with torch.autocast(x.device.type, enabled=False):
        return functional.linear(x.to(dtype), weight.to(dtype))
