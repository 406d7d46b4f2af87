"""Attention by blocks of keys, put together by their log-sum-exp (Milakov 2018, Dao 2022).

Each block of keys gives a result and, per query, the logarithm of the sum of its exponentials; from
these the softmax over all blocks follows in any order. Backward needs a block's scores again, and
the total of all blocks. No more than a tile of scores is in memory.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch

QUERIES = 512
"""Queries whose scores with a block of keys are in memory at a time."""


class Visible(Protocol):
    """Which keys queries see, by their places in the whole sequence."""

    def __call__(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor | bool:
        """True for all, false for none, or [b or 1, 1, queries, keys]."""


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

    def add(self, rows: slice, output: torch.Tensor, lse: torch.Tensor) -> None:
        """Put a block's result for some of the queries to what is there."""
        before = self.lse[:, :, rows]
        total = torch.logaddexp(before, lse)
        known = total.masked_fill(total == -torch.inf, 0.0)
        old, new = (before - known).exp()[..., None], (lse - known).exp()[..., None]
        self.output[:, :, rows] = self.output[:, :, rows] * old + output * new
        self.lse[:, :, rows] = total


def _scores(
    query: torch.Tensor, key: torch.Tensor, scale: float, seen: torch.Tensor | bool
) -> torch.Tensor:
    scores = query @ key.transpose(2, 3) * scale
    return scores if isinstance(seen, bool) else scores.masked_fill(~seen, -torch.inf)


def _tiles(
    queries: torch.Tensor, keys: torch.Tensor, visible: Visible
) -> Iterator[tuple[slice, torch.Tensor | bool]]:
    for start in range(0, len(queries), QUERIES):
        rows = slice(start, min(start + QUERIES, len(queries)))
        seen = visible(queries[rows], keys)
        if seen is not False:
            yield rows, seen


def _spread(x: torch.Tensor, groups: int, dtype: torch.dtype) -> torch.Tensor:
    """Heads of keys, once for each head of queries."""
    return x.to(dtype).repeat_interleave(groups, dim=1)


def _gathered(x: torch.Tensor, groups: int) -> torch.Tensor:
    """The adjoint of :func:`_spread`."""
    return x.unflatten(1, (x.shape[1] // groups, groups)).sum(2) if groups > 1 else x  # type: ignore[no-untyped-call]


def attend(
    sums: Sums,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    places: tuple[torch.Tensor, torch.Tensor],
    scale: float,
    visible: Visible,
) -> None:
    """Have ``sums`` see one more block of keys.

    Args:
        sums: changed in place.
        query: [b, h, s, d].
        key: [b, h_kv, keys, d].
        value: [b, h_kv, keys, d_v].
        places: of queries and of keys in the whole sequence.
        scale: of scores.
        visible: which keys count.
    """
    groups, dtype = query.shape[1] // key.shape[1], sums.output.dtype
    for rows, seen in _tiles(*places, visible):
        k, v = _spread(key, groups, dtype), _spread(value, groups, dtype)
        scores = _scores(query[:, :, rows].to(dtype), k, scale, seen)
        lse = scores.logsumexp(-1)
        weights = (scores - lse.masked_fill(lse == -torch.inf, 0.0)[..., None]).exp()
        sums.add(rows, weights @ v, lse)


@dataclass
class Gradients:
    """What backward needs of the queries, and makes for them.

    Args:
        output: gradient of the result, [b, h, s, d_v].
        delta: [b, h, s], its product with the result.
        lse: [b, h, s], over all keys.
        query: [b, h, s, d], the gradient so far.
    """

    output: torch.Tensor
    delta: torch.Tensor
    lse: torch.Tensor
    query: torch.Tensor

    def attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        places: tuple[torch.Tensor, torch.Tensor],
        scale: float,
        visible: Visible,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Add what one block of keys gives for the queries; return gradients of keys and values."""
        groups, dtype = query.shape[1] // key.shape[1], self.query.dtype
        k, v = _spread(key, groups, dtype), _spread(value, groups, dtype)
        for_key, for_value = torch.zeros_like(k), torch.zeros_like(v)
        total = self.lse.masked_fill(self.lse == -torch.inf, 0.0)[..., None]
        for rows, seen in _tiles(*places, visible):
            own = query[:, :, rows].to(dtype)
            weights = (_scores(own, k, scale, seen) - total[:, :, rows]).exp()
            gradient = self.output[:, :, rows]
            for_value += weights.transpose(2, 3) @ gradient
            inner = gradient @ v.transpose(2, 3) - self.delta[:, :, rows, None]
            for_scores = weights * inner * scale
            self.query[:, :, rows] += for_scores @ k
            for_key += for_scores.transpose(2, 3) @ own
        return _gathered(for_key, groups), _gathered(for_value, groups)
