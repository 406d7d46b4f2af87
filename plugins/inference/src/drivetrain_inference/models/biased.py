"""Attention over a paged cache with a bias for how far a key is behind its query."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from drivetrain.errors import ConfigError


def biased_attention(
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    tables: torch.Tensor,
    starts: Sequence[int],
    lengths: Sequence[int],
    scale: float,
    bias: torch.Tensor,
) -> torch.Tensor:
    """Causal attention of the newest tokens of each sequence, by torch alone.

    Arguments are those of :func:`drivetrain_kernels.paged_attention`, and:

    Args:
        query: see there.
        keys: see there.
        values: see there.
        tables: see there.
        starts: see there.
        lengths: see there.
        scale: see there.
        bias: [heads, reach], added to the score of a key that is so many tokens behind.

    Returns:
        [tokens, heads, value_dim].

    Raises:
        ConfigError: ``bias`` has other heads than queries, as where ranks share them out.
    """
    if len(bias) != query.shape[1]:
        raise ConfigError(
            f"a bias of {len(bias)} heads for queries of {query.shape[1]}: a relative bias is not "
            "served by ranks that share heads out"
        )
    size, group = keys.shape[2], query.shape[1] // keys.shape[1]
    output = query.new_empty(*query.shape[:2], values.shape[3])
    for number, length in enumerate(lengths):
        first, last = starts[number], starts[number + 1]
        blocks = tables[number, : -(-length // size)].long()
        key, value = (
            cache[blocks].transpose(0, 1).flatten(1, 2)[:, :length].float()
            for cache in (keys, values)
        )
        key, value = (part.repeat_interleave(group, 0) for part in (key, value))
        scores = query[first:last].transpose(0, 1).float() @ key.transpose(1, 2) * scale
        at = torch.arange(length - (last - first), length, device=query.device)[:, None]
        behind = at - torch.arange(length, device=query.device)[None]
        scores = scores + bias[:, behind.clamp(min=0)].float()
        weights = scores.masked_fill(behind < 0, float("-inf")).softmax(2)
        output[first:last] = (weights @ value).transpose(0, 1).to(output.dtype)
    return output
