"""Heads in place of parts of the sequence: the exchange of DeepSpeed-Ulysses (arXiv 2309.14509).

Each rank has part s of S tokens and all h heads. Before attention an all-to-all gives it all S
tokens of its share of the heads, and another takes the results back. Per rank, (S - s) tokens of
its share of query, key and value travel, so that traffic stays flat as S and ranks grow together.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache
from itertools import pairwise
from typing import Protocol

import torch

from drivetrain.errors import ConfigError


class Line(Protocol):
    """The ranks of an exchange; core's ``Functional`` is one."""

    size: int
    rank: int

    def exchange(
        self, x: torch.Tensor, output_splits: Sequence[int], input_splits: Sequence[int]
    ) -> torch.Tensor:
        """All-to-all of slices of dimension 0, differentiable."""


@dataclass(frozen=True)
class HeadShare:
    """Which heads each rank attends with; sizes differ by one where they do not divide.

    Args:
        queries: heads of queries by rank.
        keys: heads of keys that these need, by rank; one may go to several ranks.
        group: heads of queries that share one of keys.
    """

    queries: tuple[range, ...]
    keys: tuple[range, ...]
    group: int

    @staticmethod
    @lru_cache
    def of(heads: int, key_heads: int, ranks: int) -> HeadShare:
        """Share out ``heads`` in order.

        Raises:
            ConfigError: fewer heads than ranks, or heads of keys that they do not share evenly.
        """
        if heads % key_heads:
            raise ConfigError(f"{heads} heads of queries do not share {key_heads} of keys evenly")
        if heads < ranks:
            raise ConfigError(
                f"{ranks} ranks cannot share out {heads} heads: let ranks pass keys on to each "
                "other, with a sequence_parallel.ring_size of at least "
                f"{-(-ranks // heads)} that divides sequence_parallel_size"
            )
        ends = [heads * rank // ranks for rank in range(ranks + 1)]
        queries = tuple(range(a, b) for a, b in pairwise(ends))
        group = heads // key_heads
        keys = tuple(range(q.start // group, (q.stop - 1) // group + 1) for q in queries)
        return HeadShare(queries, keys, group)

    @cached_property
    def heads(self) -> int:
        """Number of heads of queries."""
        return self.queries[-1].stop

    def matched(self, key: torch.Tensor, rank: int) -> torch.Tensor:
        """``key`` [b, own key heads, ...], one per query if not all serve as many."""
        own = [head // self.group - self.keys[rank].start for head in self.queries[rank]]
        each, rest = divmod(len(own), key.shape[1])
        if not rest and own == [index // each for index in range(len(own))]:
            return key
        return key.index_select(1, torch.tensor(own, device=key.device))


def to_heads(
    line: Line, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """From all heads of this rank's tokens to its heads of all tokens; see :class:`HeadShare`.

    Args:
        line: ranks, in the order of their parts, all of one length for queries and one for keys.
        query: [b, h, s, d].
        key: [b, h_kv, keys, d].
        value: [b, h_kv, keys, d_v].

    Returns:
        [b, h', S, d], [b, h_kv', all keys, d] and [b, h_kv', all keys, d_v].
    """
    share = HeadShare.of(query.shape[1], key.shape[1], line.size)
    parts = [(query, share.queries), (key, share.keys), (value, share.keys)]
    if query.shape[2:] == key.shape[2:] == value.shape[2:]:  # one exchange for all of them
        q, k, v = _scatter_heads(line, parts)
    else:
        q, k, v = (_scatter_heads(line, [part])[0] for part in parts)
    return q, share.matched(k, line.rank), share.matched(v, line.rank)


def from_heads(line: Line, output: torch.Tensor, heads: int) -> torch.Tensor:
    """Back from this rank's heads of all tokens [b, S, h', d] to all heads of its tokens.

    Returns:
        [b, s, heads, d].
    """
    batch, length, own, width = output.shape
    rows = output.view(batch, line.size, length // line.size, own, width)
    rows = rows.permute(1, 3, 0, 2, 4).flatten(0, 1)
    counts = [
        heads * (rank + 1) // line.size - heads * rank // line.size for rank in range(line.size)
    ]
    came = line.exchange(rows, counts, [own] * line.size)
    return came.permute(1, 2, 0, 3)


def _scatter_heads(
    line: Line, parts: Sequence[tuple[torch.Tensor, Sequence[range]]]
) -> list[torch.Tensor]:
    rows = [
        x.transpose(0, 1)[shares[rank].start : shares[rank].stop]
        for rank in range(line.size)
        for x, shares in parts
    ]
    counts = [len(shares[line.rank]) for _, shares in parts]
    sent = [sum(len(shares[rank]) for _, shares in parts) for rank in range(line.size)]
    came = line.exchange(torch.cat(rows), [sum(counts)] * line.size, sent)
    came = came.view(line.size, -1, *came.shape[1:]).permute(2, 1, 0, 3, 4).flatten(2, 3)
    return list(torch.split(came, counts, 1))
