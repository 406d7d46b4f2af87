"""Attention as the device would compute it, where torch has no choice on the device ``meta``.

Torch chooses a kernel for attention by device; for tensors without memory it takes the plain
formula, which stores scores that no device would store.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

_HALF = (torch.float16, torch.bfloat16)


@contextmanager
def fused_attention(on_cpu: bool) -> Iterator[None]:
    """Have ``scaled_dot_product_attention`` run the kernel that the device would.

    Args:
        on_cpu: whether that is a CPU; else one of NVIDIA's or AMD's.
    """
    fused = _on_cpu if on_cpu else _on_gpu
    plain: Any = torch.ops.aten._scaled_dot_product_attention_math

    def attend(query: Any, key: Any, value: Any, *args: Any, **kwargs: Any) -> torch.Tensor:
        found = fused(query, key, value, *args, **kwargs)
        if found is not None:
            return found
        names = ("attn_mask", "dropout_p", "is_causal")
        kwargs = {**dict(zip(names, args, strict=False)), **kwargs}
        result: torch.Tensor = plain(query, key, value, **kwargs)[0]
        return result

    library = torch.library.Library("aten", "IMPL")  # type: ignore[no-untyped-call]
    library.impl("scaled_dot_product_attention", attend, "AutogradMeta")  # type: ignore[no-untyped-call]
    try:
        yield
    finally:
        library._destroy()  # type: ignore[no-untyped-call]


def _repeated(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, enable_gqa: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    """Keys and values of shared heads once for each head of queries, as kernels get them."""
    times = query.shape[-3] // key.shape[-3] if enable_gqa else 1
    if times == 1:
        return key, value
    return key.repeat_interleave(times, -3), value.repeat_interleave(times, -3)


def _alike(*tensors: torch.Tensor) -> bool:
    shapes = {(t.shape[0], t.shape[-1], t.dim(), t.dtype) for t in tensors}
    return len(shapes) == 1 and tensors[0].dim() == 4


def _on_cpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor | None:
    """``None`` where the kernel for CPUs does not serve."""
    learns = attn_mask is not None and attn_mask.requires_grad
    if dropout_p or learns or not _alike(query, key, value):
        return None
    key, value = _repeated(query, key, value, enable_gqa)
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    fused: Any = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    result: torch.Tensor = fused(
        query, key, value, 0.0, is_causal, attn_mask=attn_mask, scale=scale
    )[0]
    return result


def _on_gpu(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attn_mask: torch.Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> torch.Tensor | None:
    """``None`` where no kernel of a GPU serves."""
    if not _alike(query, key, value):
        return None
    key, value = _repeated(query, key, value, enable_gqa)
    ops: Any = torch.ops.aten
    if attn_mask is None and query.dtype in _HALF and query.shape[-1] <= 256:
        flash: torch.Tensor = ops._scaled_dot_product_flash_attention(
            query, key, value, dropout_p, is_causal, False, scale=scale
        )[0]
        return flash
    if attn_mask is not None and attn_mask.dtype == torch.bool:
        attn_mask = torch.empty_like(attn_mask, dtype=query.dtype)
    shape = (*query.shape[:3], key.shape[-2])
    mask = None if attn_mask is None else attn_mask.expand(shape)
    grads = any(t.requires_grad for t in (query, key, value))
    efficient: torch.Tensor = ops._scaled_dot_product_efficient_attention(
        query, key, value, mask, grads, dropout_p, is_causal, scale=scale
    )[0]
    return efficient
