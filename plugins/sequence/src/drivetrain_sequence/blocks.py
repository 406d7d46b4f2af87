"""Attention by blocks of keys, put together by their log-sum-exp (Milakov 2018, Dao 2022).

Each block of keys gives a result and, per query, the logarithm of the sum of its exponentials; from
these the softmax over all blocks follows in any order. Backward needs a block's scores again, and
the total of all blocks. Torch's fused kernels compute blocks that are seen whole, or are plainly
causal; plain operations compute the others, a tile of scores at a time.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from enum import Enum
from itertools import product
from typing import Protocol

import torch

from drivetrain_sequence import fused

QUERIES, KEYS = 512, 2048
"""Queries and keys whose scores are in memory at a time where no fused kernel computes them."""


class Sight(Enum):
    """How much of a block of keys a run of queries sees."""

    NONE = 0
    ALL = 1
    CAUSAL = 2
    """Queries and keys are at the same places, and each query sees keys up to its own."""
    SOME = 3


class Visible(Protocol):
    """Which keys queries see, by their places in the whole sequence."""

    def of(self, queries: range, keys: range) -> Sight:
        """How much is seen, decided without looking at any tensor."""

    def tile(self, queries: range, keys: range) -> torch.Tensor:
        """What is seen, [b or 1, 1, queries, keys]."""


@dataclass(frozen=True, eq=False)
class Scoring:
    """How scores follow from products of queries and keys.

    Args:
        scale: factor of products.
        softcap: scores are softcap * tanh(scores / softcap).
        slopes: [h], subtracted from scores times the distance of query and key (ALiBi).
    """

    scale: float
    softcap: float | None = None
    slopes: torch.Tensor | None = None

    @property
    def is_plain(self) -> bool:
        """Whether there is only a scale."""
        return self.softcap is None and self.slopes is None

    def scores(
        self, query: torch.Tensor, key: torch.Tensor, queries: range, keys: range
    ) -> tuple[torch.Tensor, torch.Tensor | float]:
        """Scores [b, h, queries, keys], and their derivative by products."""
        scores, slope = query @ key.transpose(2, 3) * self.scale, self.scale
        derivative: torch.Tensor | float = slope
        if self.softcap is not None:
            bent = torch.tanh(scores / self.softcap)
            scores, derivative = self.softcap * bent, slope * (1 - bent.square())
        if self.slopes is not None:
            away = (places(queries, query)[:, None] - places(keys, query)).abs()
            scores = scores - self.slopes.to(scores)[:, None, None] * away
        return scores, derivative


def places(run: range, like: torch.Tensor) -> torch.Tensor:
    """The indices of ``run`` on the device of ``like``."""
    return torch.arange(run.start, run.stop, device=like.device)


@dataclass
class Sums:
    """What queries have seen so far.

    Args:
        output: [b, h, s, d], the result over the keys so far.
        lse: [b, h, s], logarithm of the sum of exponentials; -inf before any.
    """

    output: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def none(cls, query: torch.Tensor, width: int) -> Sums:
        """Before any keys."""
        shape, dtype = query.shape[:3], torch.promote_types(query.dtype, torch.float32)
        output = query.new_zeros((*shape, width), dtype=dtype)
        return cls(output, query.new_full(shape, -torch.inf, dtype=dtype))

    def part(self, rows: slice) -> Sums:
        """Views of some queries."""
        return Sums(self.output[:, :, rows], self.lse[:, :, rows])

    def add(self, output: torch.Tensor, lse: torch.Tensor) -> None:
        """Put a block's result to what is there, in place."""
        total = torch.logaddexp(self.lse, lse)
        known = total.masked_fill(total == -torch.inf, 0.0)
        old, new = (self.lse - known).exp()[..., None], (lse - known).exp()[..., None]
        self.output.mul_(old).add_(output * new)
        self.lse.copy_(total)

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        runs: tuple[range, range],
        scoring: Scoring,
        visible: Visible,
    ) -> None:
        """See one more block of keys.

        Args:
            query: [b, h, s, d].
            key: [b, h_kv, keys, d].
            value: [b, h_kv, keys, d_v].
            runs: places of queries and of keys in the whole sequence.
            scoring: how scores are made.
            visible: which keys count.
        """
        sight = visible.of(*runs)
        if sight is Sight.NONE:
            return
        groups, dtype = query.shape[1] // key.shape[1], self.output.dtype
        if _is_fused(sight, scoring, query, value):
            key, value = _spread(key, groups, key.dtype), _spread(value, groups, value.dtype)
            causal = sight is Sight.CAUSAL
            self.add(*fused.forward(query, key, value, scoring.scale, causal))
            return
        for rows, columns, tile, seen in _tiles(*runs, visible):
            k, v = (_spread(x[:, :, columns], groups, dtype) for x in (key, value))
            scores, _ = scoring.scores(query[:, :, rows].to(dtype), k, *tile)
            scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
            lse = scores.logsumexp(-1)
            weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
            self.part(rows).add(weights @ v, lse)

    def see_sinks(self, sinks: torch.Tensor) -> None:
        """Give weight to one more score per head [h] that has no value."""
        total = torch.logaddexp(self.lse, sinks.to(self.lse.dtype)[:, None])
        self.output.mul_((self.lse - total).exp()[..., None])
        self.lse.copy_(total)


@dataclass
class Gradients:
    """What backward needs of the queries, and makes for them.

    Args:
        output: gradient of the result, [b, h, s, d_v].
        result: [b, h, s, d_v].
        lse: [b, h, s], over all keys.
        delta: [b, h, s], product of result and its gradient.
        query: [b, h, s, d], the gradient so far.
    """

    output: torch.Tensor
    result: torch.Tensor
    lse: torch.Tensor
    delta: torch.Tensor
    query: torch.Tensor

    @classmethod
    def of(
        cls, query: torch.Tensor, gradient: torch.Tensor, result: torch.Tensor, lse: torch.Tensor
    ) -> Gradients:
        """Before any keys."""
        delta = (gradient.to(lse.dtype) * result.to(lse.dtype)).sum(-1)
        return cls(gradient, result, lse, delta, torch.zeros_like(query, dtype=lse.dtype))

    def part(self, rows: slice) -> Gradients:
        """Views of some queries."""
        parts = (self.output, self.result, self.lse, self.delta, self.query)
        return Gradients(*(x[:, :, rows] for x in parts))

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        runs: tuple[range, range],
        scoring: Scoring,
        visible: Visible,
    ) -> tuple[torch.Tensor, torch.Tensor] | None:
        """Add what one block of keys gives for the queries.

        Returns:
            Gradients of keys and values in the precision of sums; ``None`` if no key is seen.
        """
        sight = visible.of(*runs)
        if sight is Sight.NONE:
            return None
        groups, dtype = query.shape[1] // key.shape[1], self.query.dtype
        if _is_fused(sight, scoring, query, value):
            key, value = _spread(key, groups, key.dtype), _spread(value, groups, value.dtype)
            known, causal = (self.output, self.result, self.lse), sight is Sight.CAUSAL
            own, *others = fused.backward(known, query, key, value, scoring.scale, causal)
            self.query += own
            for_key, for_value = (_gathered(x.to(dtype), groups) for x in others)
            return for_key, for_value
        for_key, for_value = (torch.zeros_like(x, dtype=dtype) for x in (key, value))
        total = self.lse.masked_fill(self.lse == -torch.inf, 0.0)[..., None]
        for rows, columns, tile, seen in _tiles(*runs, visible):
            own, gradient = query[:, :, rows].to(dtype), self.output[:, :, rows].to(dtype)
            k, v = (_spread(x[:, :, columns], groups, dtype) for x in (key, value))
            scores, derivative = scoring.scores(own, k, *tile)
            scores = scores if seen is None else scores.masked_fill(~seen, -torch.inf)
            weights = (scores - total[:, :, rows]).exp()
            inner = gradient @ v.transpose(2, 3) - self.delta[:, :, rows, None]
            for_scores = weights * inner * derivative
            self.query[:, :, rows] += for_scores @ k
            for_value[:, :, columns] += _gathered(weights.transpose(2, 3) @ gradient, groups)
            for_key[:, :, columns] += _gathered(for_scores.transpose(2, 3) @ own, groups)
        return for_key, for_value

    def of_sinks(self, sinks: torch.Tensor) -> torch.Tensor:
        """The gradient of ``sinks`` [h]."""
        weights = (sinks.to(self.lse.dtype)[:, None] - self.lse).exp()
        return -(weights * self.delta).sum((0, 2)).to(sinks.dtype)


def _is_fused(sight: Sight, scoring: Scoring, query: torch.Tensor, value: torch.Tensor) -> bool:
    whole = sight in (Sight.ALL, Sight.CAUSAL) and scoring.is_plain
    return whole and fused.serves(query, value)


def _tiles(
    queries: range, keys: range, visible: Visible
) -> Iterator[tuple[slice, slice, tuple[range, range], torch.Tensor | None]]:
    """Rows and columns of tiles of which something is seen, their places, and what is seen."""
    starts = product(range(0, len(queries), QUERIES), range(0, len(keys), KEYS))
    for first, start in starts:
        rows, columns = slice(first, first + QUERIES), slice(start, start + KEYS)
        tile = (queries[rows], keys[columns])
        sight = visible.of(*tile)
        if sight is Sight.NONE:
            continue
        seen = None if sight is Sight.ALL else visible.tile(*tile)
        # Elsewhere than on a host the look would wait for the device.
        if seen is None or seen.device.type != "cpu" or bool(seen.any()):
            yield rows, columns, tile, seen


def _spread(x: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """Heads of keys, once for each head of queries."""
    x = x.to(dtype)
    return x if groups == 1 else x.repeat_interleave(groups, dim=1)


def _gathered(x: torch.Tensor, groups: int) -> torch.Tensor:
    """The adjoint of :func:`_spread`."""
    return x.unflatten(1, (x.shape[1] // groups, groups)).sum(2) if groups > 1 else x  # type: ignore[no-untyped-call]
