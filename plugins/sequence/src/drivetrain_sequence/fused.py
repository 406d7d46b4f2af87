"""Torch's fused attention for a block of keys, with what blocks are put together by.

They give the log-sum-exp of scores, and in backward take that of all blocks, so that a block's
part of the gradients comes out.
"""

from __future__ import annotations

from typing import Any

import torch

_HOST = (torch.float64, torch.float32, torch.bfloat16, torch.float16)
_CUDA = (torch.bfloat16, torch.float16)


def serves(query: torch.Tensor, value: torch.Tensor) -> bool:
    """Whether a fused kernel computes queries [b, h, s, d] with values [b, h_kv, keys, d_v]."""
    width = query.shape[-1]
    if width != value.shape[-1]:
        return False
    if query.device.type == "cuda":
        return query.dtype in _CUDA and width % 8 == 0 and width <= 256
    # Tensors without memory have the shapes of the host's kernel.
    return query.device.type in ("cpu", "meta") and query.dtype in _HOST


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, causal: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """The result [b, h, s, d] and the log-sum-exp [b, h, s] of a block, all heads alike many."""
    aten: Any = torch.ops.aten
    if query.device.type != "cuda":
        found = aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, causal, scale=scale
        )
    else:
        found = aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, causal, False, scale=scale
        )
    return found[0], found[1]


def backward(
    known: tuple[torch.Tensor, torch.Tensor, torch.Tensor],
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    causal: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Gradients of query, key and value.

    Args:
        known: gradient of the result over all blocks, that result, and its log-sum-exp.
        query: [b, h, s, d].
        key: of the block.
        value: of the block.
        scale: of scores.
        causal: whether each query sees keys up to its own.
    """
    aten: Any = torch.ops.aten
    gradient, result, lse = known
    given = (gradient.to(query.dtype), query, key, value, result.to(query.dtype), lse)
    tensors = tuple(x.contiguous() for x in given)
    if query.device.type != "cuda":
        found = aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *tensors, 0.0, causal, scale=scale
        )
    else:
        none = torch.empty(0, dtype=torch.int64, device=query.device)
        sizes = (None, None, query.shape[2], key.shape[2])
        found = aten._scaled_dot_product_flash_attention_backward(
            *tensors, *sizes, 0.0, causal, none, none, scale=scale
        )
    return found[0], found[1], found[2]
