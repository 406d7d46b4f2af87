"""Calls of the kernels for block-sparse attention, in block_sparse.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int32, c_int64
from ctypes import c_void_p as pointer
from typing import Any

import torch
from drivetrain_kernels.ops.block_sparse_attention import (
    BLOCK_SPARSE_ATTENTION,
    BLOCK_SPARSE_ATTENTION_BACKWARD,
    Visibility,
    heads_inside,
)

from drivetrain_cpu.kernels.call import DTYPES, Bind, succeed

MOST_BLOCK, MOST_WIDTH = 128, 256
"""Tokens of a block, and elements of a head, that the kernel has scratch memory for."""


class _Place(Structure):
    """``Place`` of block_sparse.cpp."""

    _fields_ = [(name, c_int64) for name in ("sample", "head", "token")]


class _BlockSparse(Structure):
    """``BlockSparse`` of block_sparse.cpp."""

    _fields_ = [
        *((name, pointer) for name in ("query", "key", "value", "gradient")),
        *((name, _Place) for name in ("query_at", "key_at", "value_at", "gradient_at")),
        *((name, pointer) for name in ("starts", "columns")),
        *((name, pointer) for name in ("back_starts", "back_rows", "back_entries")),
        *((name, c_int64) for name in ("list_sample", "list_head", "back_sample", "back_head")),
        *((name, pointer) for name in ("query_segments", "key_segments", "mask", "bias")),
        *((name, c_int64) for name in ("mask_sample", "bias_sample", "bias_entries")),
        ("out", pointer),
        ("out_at", _Place),
        *((name, pointer) for name in ("lse", "for_bias", "delta")),
        *((name, pointer) for name in ("for_query", "for_key", "for_value")),
        *((name, c_int64) for name in ("batch", "heads", "kv_heads", "queries", "keys")),
        *((name, c_int64) for name in ("dim", "value_dim", "block")),
        ("scale", c_float),
        *((name, c_int32) for name in ("causal", "dtype", "threads")),
    ]


def bind_forward(library: ctypes.CDLL) -> Callable[..., Any]:
    """``block_sparse_attention``; very large blocks and heads are left to the reference."""
    function = library.dt_block_sparse_attention
    function.argtypes, function.restype = [POINTER(_BlockSparse)], c_int
    reference = torch.no_grad()(BLOCK_SPARSE_ATTENTION.reference)

    def block_sparse_attention(
        query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor,
        columns: torch.Tensor, *others: Any,
    ) -> Any:  # fmt: skip
        visible = Visibility(*others)
        if _too_large(query, value, visible):
            return reference(query, key, value, starts, columns, *others)
        out = heads_inside(query, value.shape[3])
        lse = query.new_empty(query.shape[:3], dtype=torch.float32)
        call = _call(query, key, value, starts, columns, visible)
        call.out, call.out_at, call.lse = out.data_ptr(), _place(out), lse.data_ptr()
        succeed(function(byref(call)))
        return out, lse

    return block_sparse_attention


def bind_backward(library: ctypes.CDLL) -> Callable[..., Any]:
    """``block_sparse_attention_backward``, likewise."""
    function = library.dt_block_sparse_attention_backward
    function.argtypes, function.restype = [POINTER(_BlockSparse)], c_int
    reference = torch.no_grad()(BLOCK_SPARSE_ATTENTION_BACKWARD.reference)

    def block_sparse_attention_backward(
        gradient: torch.Tensor, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor,
        lse: torch.Tensor, delta: torch.Tensor, starts: torch.Tensor, columns: torch.Tensor,
        back_starts: torch.Tensor, back_rows: torch.Tensor, back_entries: torch.Tensor,
        *others: Any,
    ) -> Any:  # fmt: skip
        visible, bias_gradient = Visibility(*others[:-1]), others[-1]
        if _too_large(query, value, visible):
            lists = (starts, columns, back_starts, back_rows, back_entries)
            return reference(gradient, query, key, value, lse, delta, *lists, *others)
        call = _call(query, key, value, starts, columns, visible)
        call.gradient, call.gradient_at = gradient.data_ptr(), _place(gradient)
        call.lse, call.delta = lse.data_ptr(), delta.data_ptr()
        call.back_starts, call.back_rows = back_starts.data_ptr(), back_rows.data_ptr()
        call.back_entries = back_entries.data_ptr()
        call.back_sample, call.back_head = _distances(back_starts)
        grads = [_zeros(x) for x in (query, key, value)]
        call.for_query, call.for_key, call.for_value = (x.data_ptr() for x in grads)
        for_bias = query.new_empty(0, dtype=torch.float32)
        if bias_gradient:
            call.bias_entries = len(columns) // starts.shape[0]
            shape = (query.shape[0], call.bias_entries, visible.block, visible.block)
            for_bias = query.new_zeros(shape, dtype=torch.float32)
            call.for_bias = for_bias.data_ptr()
        succeed(function(byref(call)))
        return (*(x.to(query.dtype) for x in grads), for_bias)

    return block_sparse_attention_backward


def _too_large(query: torch.Tensor, value: torch.Tensor, visible: Visibility) -> bool:
    width = max(query.shape[3], value.shape[3])
    return visible.block > MOST_BLOCK or width > MOST_WIDTH


def _zeros(like: torch.Tensor) -> torch.Tensor:
    return heads_inside(like, like.shape[3], torch.float32).zero_()


def _call(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, starts: torch.Tensor,
    columns: torch.Tensor, visible: Visibility,
) -> _BlockSparse:  # fmt: skip
    call = _BlockSparse()
    for name, x in (("query", query), ("key", key), ("value", value)):
        setattr(call, name, x.data_ptr())
        setattr(call, f"{name}_at", _place(x))
    call.starts, call.columns = starts.data_ptr(), columns.data_ptr()
    call.list_sample, call.list_head = _distances(starts)
    for name in ("query_segments", "key_segments", "mask", "bias"):
        x = getattr(visible, name)
        setattr(call, name, None if x is None else x.data_ptr())
    call.mask_sample, call.bias_sample = _apart(visible.mask), _apart(visible.bias)
    call.batch, call.heads, call.queries, call.dim = query.shape
    call.kv_heads, call.keys, call.value_dim = value.shape[1:]
    call.block, call.scale, call.causal = visible.block, visible.scale, visible.causal
    call.dtype, call.threads = DTYPES[query.dtype], torch.get_num_threads()
    return call


def _place(x: torch.Tensor) -> _Place:
    return _Place(*x.stride()[:3])


def _distances(starts: torch.Tensor) -> tuple[int, int]:
    """Between the lists of two samples and of two heads; 0 where they share theirs."""
    samples, heads, length = starts.shape
    return (heads * length if samples > 1 else 0), (length if heads > 1 else 0)


def _apart(x: torch.Tensor | None) -> int:
    """Between the blocks of two samples; 0 where they share theirs."""
    return x.stride(0) if x is not None and len(x) > 1 else 0


BINDINGS: dict[str, Bind] = {
    "block_sparse_attention": bind_forward,
    "block_sparse_attention_backward": bind_backward,
}
"""Op name -> what makes the function, given the library."""
