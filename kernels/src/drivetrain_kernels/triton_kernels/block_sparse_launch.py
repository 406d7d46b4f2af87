"""Calls of the Triton kernels for block-sparse attention; arguments in schema order."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import triton

from drivetrain_kernels.ops.block_sparse_attention import (
    BLOCK_SPARSE_ATTENTION,
    BLOCK_SPARSE_ATTENTION_BACKWARD,
    Visibility,
    heads_inside,
)
from drivetrain_kernels.triton_kernels import block_sparse

_BLOCKS = (16, 32, 64, 128)
"""Tokens of a block that a program can hold; others are left to the reference."""
_WIDEST = 256


def block_sparse_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor,
    columns: torch.Tensor, *others: Any,
) -> Any:  # fmt: skip
    """``block_sparse_attention``."""
    visible = Visibility(*others)
    if not _fits(query, value, visible):
        reference = torch.no_grad()(BLOCK_SPARSE_ATTENTION.reference)
        return reference(query, key, value, starts, columns, *others)
    out = heads_inside(query, value.shape[3])
    lse = query.new_empty(query.shape[:3], dtype=torch.float32)
    rows = starts.shape[2] - 1
    if rows and query.shape[0]:
        _run(
            block_sparse.forward_kernel, query, (rows, query.shape[0] * query.shape[1]),
            query, key, value, starts, columns, *_masks(visible), out, lse,
            *_places(query, key, value, out), *_distances(starts), *_apart(visible),
            *_sizes(query, key, value), *_constants(query, value, visible),
        )  # fmt: skip
    return out, lse


def block_sparse_attention_backward(
    gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
    lse: torch.Tensor, delta: torch.Tensor, starts: torch.Tensor, columns: torch.Tensor,
    back_starts: torch.Tensor, back_rows: torch.Tensor, back_entries: torch.Tensor, *others: Any,
) -> Any:  # fmt: skip
    """``block_sparse_attention_backward``."""
    visible, bias_gradient = Visibility(*others[:-1]), others[-1]
    if not _fits(query, value, visible):
        lists = (starts, columns, back_starts, back_rows, back_entries)
        reference = torch.no_grad()(BLOCK_SPARSE_ATTENTION_BACKWARD.reference)
        return reference(gradient, query, key, value, lse, delta, *lists, *others)
    of_query, of_key, of_value = (heads_inside(x, x.shape[3]) for x in (query, key, value))
    for_bias = query.new_empty(0, dtype=torch.float32)
    entries = len(columns) // starts.shape[0]
    if bias_gradient:
        for_bias = query.new_empty(
            query.shape[0], entries, visible.block, visible.block, dtype=torch.float32
        )
    given = (gradient, query, key, value, lse, delta)
    places = _places(gradient, query, key, value)
    sizes, constants = _sizes(query, key, value), _constants(query, value, visible)
    rows, blocks = starts.shape[2] - 1, back_starts.shape[2] - 1
    if rows and query.shape[0]:
        _run(
            block_sparse.query_gradient_kernel, query, (rows, query.shape[0] * query.shape[1]),
            *given, starts, columns, *_masks(visible), of_query,
            for_bias if bias_gradient else None, *places, *_places(of_query),
            *_distances(starts), *_apart(visible), entries, *sizes, *constants,
        )  # fmt: skip
    if blocks and key.shape[0]:
        _run(
            block_sparse.key_gradient_kernel, query, (blocks, key.shape[0] * key.shape[1]),
            *given, back_starts, back_rows, back_entries, *_masks(visible), of_key, of_value,
            *places, *_places(of_key, of_value), *_distances(back_starts), *_apart(visible),
            *sizes, *constants,
        )  # fmt: skip
    return of_query, of_key, of_value, for_bias


def _fits(query: torch.Tensor, value: torch.Tensor, visible: Visibility) -> bool:
    return visible.block in _BLOCKS and max(query.shape[3], value.shape[3]) <= _WIDEST


def _masks(visible: Visibility) -> tuple[torch.Tensor | None, ...]:
    mask = None if visible.mask is None else visible.mask.view(torch.uint8)
    return visible.query_segments, visible.key_segments, mask, visible.bias


def _places(*tensors: torch.Tensor) -> list[int]:
    """Distances of samples, heads and tokens."""
    return [stride for x in tensors for stride in x.stride()[:3]]


def _distances(starts: torch.Tensor) -> tuple[int, int]:
    """Between the lists of two samples and of two heads; 0 where they share theirs."""
    samples, heads, length = starts.shape
    return (heads * length if samples > 1 else 0), (length if heads > 1 else 0)


def _apart(visible: Visibility) -> tuple[int, int]:
    """Between the blocks of mask and bias of two samples; 0 where they share theirs."""
    pair = (visible.mask, visible.bias)
    return tuple(x.stride(0) if x is not None and len(x) > 1 else 0 for x in pair)  # type: ignore[return-value]


def _sizes(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> tuple[int, ...]:
    heads, queries, dim = query.shape[1:]
    return heads, heads // key.shape[1], queries, key.shape[2], dim, value.shape[3]


def _constants(
    query: torch.Tensor, value: torch.Tensor, visible: Visibility
) -> tuple[float, bool, int, int, int]:
    wide, value_wide = (max(16, triton.next_power_of_2(x.shape[3])) for x in (query, value))
    return visible.scale, visible.causal, visible.block, wide, value_wide


def _run(kernel: Any, query: torch.Tensor, grid: tuple[int, int], *arguments: Any) -> None:
    device = query.device
    current: AbstractContextManager[Any] = nullcontext()
    if device.type != "cpu":
        current = torch.get_device_module(device.type).device(device)
    with current:
        launch(kernel, grid, *arguments)


def launch(kernel: Any, grid: tuple[int, int], *arguments: Any) -> None:
    """Queue one kernel."""
    kernel[grid](*arguments)
