"""Blocks chosen by what they hold: for each block of queries, the keys that matter most to it.

A block of keys is scored by the mean of its keys against the mean of the queries of a block, as in
MoBA (Lu et al. 2025, arXiv 2502.13189). Choosing for all heads that share keys at once, and always
the first and the own block, is of native sparse attention (Yuan et al. 2025, arXiv 2502.11089). The
choice has no gradient; attention to what is chosen has.
"""

from __future__ import annotations

import torch


@torch.no_grad()
def choose_blocks(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    block: int,
    count: int,
    causal: bool,
    of_queries: torch.Tensor | None = None,
    of_keys: torch.Tensor | None = None,
) -> torch.Tensor:
    """Choose at most ``count`` blocks of keys for each block of queries.

    Args:
        query: [b, h, s, d].
        key: [b, h_kv, s, d], h a multiple of h_kv.
        block: tokens of a block.
        count: blocks of a row, the own one and the first included.
        causal: choose none ahead of the queries' own.
        of_queries: [b, s], int32, document of each query; ``None`` for one document.
        of_keys: [b, s], int32, of each key; padding has a number that no query has.

    Returns:
        [b, h, blocks, blocks], bool. Rows have fewer where fewer can be seen.
    """
    batch, heads = query.shape[:2]
    groups = heads // key.shape[1]
    wide = torch.promote_types(query.dtype, torch.float32)
    queries = _means(query.to(wide), block).unflatten(1, (-1, groups)).sum(2)  # type: ignore[no-untyped-call]
    keys = _means(key.to(wide), block, None if of_keys is None else _real(of_queries, of_keys))
    scores = queries @ keys.transpose(2, 3)
    blocks = scores.shape[2]
    place = torch.arange(blocks, device=query.device)
    own = place[:, None] == place
    can = torch.ones_like(own) if not causal else place[:, None] >= place
    can = can.expand(batch, 1, blocks, blocks)
    if of_queries is not None and of_keys is not None:
        can = can & _share_documents(of_queries, of_keys, block)[:, None]
    scores = scores.masked_fill(~can, -torch.inf)
    scores = scores.masked_fill(can & (own | (place == 0)), torch.inf)
    best = scores.topk(min(count, blocks), dim=3)
    chosen = torch.zeros_like(scores, dtype=torch.bool)
    chosen.scatter_(3, best.indices, best.values > -torch.inf)
    chosen |= own  # rows of nothing but padding
    return chosen.repeat_interleave(groups, dim=1)


def _real(of_queries: torch.Tensor | None, of_keys: torch.Tensor) -> torch.Tensor | None:
    """[b, s]: keys that are the token of some query."""
    return None if of_queries is None else of_queries == of_keys


def _means(x: torch.Tensor, block: int, real: torch.Tensor | None = None) -> torch.Tensor:
    """Means [b, h, blocks, d] of the tokens of each block, without padding."""
    missing = -x.shape[2] % block
    if real is None:
        real = torch.ones(x.shape[0], x.shape[2], dtype=torch.bool, device=x.device)
    weight = torch.nn.functional.pad(real[:, None, :, None].to(x.dtype), (0, 0, 0, missing))
    x = torch.nn.functional.pad(x, (0, 0, 0, missing)) * weight
    sums = x.reshape(*x.shape[:2], -1, block, x.shape[3]).sum(3)
    counts = weight.reshape(x.shape[0], 1, -1, block, 1).sum(3)
    return sums / counts.clamp(min=1)


def _share_documents(of_queries: torch.Tensor, of_keys: torch.Tensor, block: int) -> torch.Tensor:
    """[b, blocks, blocks]: whether a document can have queries in one and keys in the other.

    Documents lie one after the other, so a block has all numbers between its least and its largest.
    """
    real = of_queries == of_keys
    big = torch.iinfo(torch.int32).max
    missing = -of_keys.shape[1] % block

    def of_blocks(x: torch.Tensor, fill: int) -> torch.Tensor:
        return torch.nn.functional.pad(x, (0, missing), value=fill).unflatten(1, (-1, block))  # type: ignore[no-untyped-call, no-any-return]

    least = (
        of_blocks(of_queries, big).amin(2),
        of_blocks(of_keys.masked_fill(~real, big), big).amin(2),
    )
    most = (
        of_blocks(of_queries, -big).amax(2),
        of_blocks(of_keys.masked_fill(~real, -big), -big).amax(2),
    )
    return (least[0][:, :, None] <= most[1][:, None]) & (least[1][:, None] <= most[0][:, :, None])
