"""Attention to listed blocks by torch's FlexAttention, on devices where it serves (2412.05496).

It compiles a kernel for a function of indices, and skips the blocks that a list leaves out. Its own
blocks have 128 tokens: of smaller ones it would compute what is around them, which the operator of
``drivetrain_kernels`` does not, and so does what is told by a tensor for each listed block.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from drivetrain_kernels import Visibility

from drivetrain_sparse_attention.visibility import Blocks

if TYPE_CHECKING:
    from torch.nn.attention.flex_attention import BlockMask

BLOCK, WIDTHS = 128, (16, 256)
"""Tokens of its blocks, and the widths of heads that it takes."""

CAPABILITY = (8, 0)
"""Of an NVIDIA GPU whose kernels it compiles with the products that they are fast with."""

_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_Lists = tuple[torch.Tensor, torch.Tensor]
_lists: WeakKeyDictionary[Blocks, dict[bool | None, tuple[_Lists, _Lists]]] = WeakKeyDictionary()


def serves(
    query: torch.Tensor,
    value: torch.Tensor,
    visible: Visibility,
    capability: tuple[int, int] | None,
) -> bool:
    """Whether it computes a call as it should.

    Args:
        query: [b, h, s, d].
        value: [b, h_kv, t, d_v].
        visible: what else decides than the blocks.
        capability: of the GPU; ``None`` for other devices, which have no backward of it.
    """
    return (
        capability is not None
        and capability >= CAPABILITY
        and visible.block % BLOCK == 0
        and visible.mask is None
        and visible.bias is None
        and query.dtype in _DTYPES
        and all(WIDTHS[0] <= x.shape[3] <= WIDTHS[1] for x in (query, value))
    )


def capability_of(device: torch.device) -> tuple[int, int] | None:
    """The compute capability of a GPU of NVIDIA; ``None`` for any other device."""
    if device.type != "cuda" or torch.version.hip is not None:
        return None
    return torch.cuda.get_device_capability(device)


def attend_by_flex(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    blocks: Blocks,
    visible: Visibility,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attend to the listed blocks, as ``attend_to_blocks`` does.

    Args:
        query: [b, h, s, d].
        key: [b, h_kv, t, d], h a multiple of h_kv.
        value: [b, h_kv, t, d_v].
        blocks: that queries see.
        visible: what else decides; see :func:`serves`.

    Returns:
        The result [b, h, s, d_v], and the logarithms of the sums of exponentials [b, h, s].
    """
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    mask = flex_mask(blocks, visible, (query.shape[2], key.shape[2]))
    # Without a compiler it makes all scores, as tests on a CPU have it do.
    attend = _compiled() if query.device.type == "cuda" else flex_attention
    out, aux = attend(
        query,
        key,
        value,
        block_mask=mask,
        scale=visible.scale,
        enable_gqa=query.shape[1] != key.shape[1],
        return_aux=AuxRequest(lse=True),
    )
    return out, aux.lse


def flex_mask(blocks: Blocks, visible: Visibility, lengths: tuple[int, int]) -> BlockMask:
    """The mask of listed blocks, causality and segments.

    Args:
        blocks: that queries see.
        visible: what else decides.
        lengths: tokens of queries and of keys.
    """
    from torch.nn.attention.flex_attention import BlockMask

    told = None if visible.query_segments is not None else visible.causal
    known = _lists.setdefault(blocks, {})
    if told not in known:
        known[told] = _listed(blocks.seen, told)
    some, whole = known[told]
    return BlockMask.from_kv_blocks(
        *some,
        *whole,
        BLOCK_SIZE=blocks.size,
        mask_mod=_allowed(blocks, visible),
        seq_lengths=lengths,
    )


def _listed(seen: torch.Tensor, causal: bool | None) -> tuple[_Lists, _Lists]:
    """Blocks of which some is seen, and those that are seen whole; ``None``: segments may hide."""
    whole = seen.tril(-1) if causal else seen
    if causal is None:
        whole = torch.zeros_like(seen)
    return _in_order(seen & ~whole), _in_order(whole)


def _in_order(seen: torch.Tensor) -> _Lists:
    """How many blocks [b, h, rows] each row sees, and which come first [b, h, rows, columns]."""
    order = seen.to(torch.int8).argsort(dim=3, descending=True, stable=True)
    return seen.sum(3, dtype=torch.int32), order.to(torch.int32)


def _allowed(blocks: Blocks, visible: Visibility) -> Callable[..., torch.Tensor]:
    seen, size, causal = blocks.seen, blocks.size, visible.causal
    by_sample, by_head = seen.shape[0] > 1, seen.shape[1] > 1
    of_queries, of_keys = visible.query_segments, visible.key_segments

    def allowed(
        sample: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor
    ) -> torch.Tensor:
        row, column = query // size, key // size
        found = seen[sample if by_sample else 0, head if by_head else 0, row, column]
        if causal:
            found = found & (query >= key)
        if of_queries is not None and of_keys is not None:
            found = found & (of_queries[sample, query] == of_keys[sample, key])
        return found

    return allowed


@cache
def _compiled() -> Any:
    from torch.nn.attention.flex_attention import flex_attention

    return torch.compile(flex_attention)
