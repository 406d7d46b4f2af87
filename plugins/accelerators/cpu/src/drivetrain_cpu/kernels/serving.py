"""Calls of the kernels for serving, in attention.cpp, decoder.cpp and the files of products."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, Structure, byref, c_float, c_int, c_int32, c_int64
from ctypes import c_void_p as pointer

import torch
from drivetrain_kernels.ops.decoder import ACTIVATIONS
from drivetrain_kernels.ops.paged_attention import PAGED_ATTENTION

from drivetrain_cpu.kernels.call import DTYPES, Bind, succeed, threads_for

MOST_DIM, MOST_GROUP = 256, 48
"""Elements of a head, and query heads per head of keys, that the kernel has scratch memory for."""
CODES = {("int8", True): 0, ("int8", False): 1, ("int4", True): 2, ("int4", False): 3}
"""Codes of ``Codes`` in linear.cpp."""


class _Attention(Structure):
    """``Attention`` of attention.cpp."""

    _fields_ = [
        *((name, pointer) for name in ("query", "keys", "values")),
        *((name, pointer) for name in ("tables", "starts", "lengths", "sinks", "out")),
        *((name, c_int64) for name in ("query_stride", "sequences", "table_stride", "heads")),
        *((name, c_int64) for name in ("kv_heads", "size", "dim", "value_dim", "window")),
        ("scale", c_float),
        ("softcap", c_float),
        ("dtype", c_int32),
        ("threads", c_int32),
    ]


class _BlockWeight(Structure):
    """``BlockWeight`` of integers.cpp."""

    _fields_ = [
        ("codes", pointer),
        ("parameters", pointer),
        *((name, c_int64) for name in ("inputs", "outputs", "block", "blocks")),
        ("bits", c_int32),
        ("offsets", c_int32),
    ]


def bind_paged_attention(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``paged_attention``; heads that are very wide are left to the reference."""
    function = library.dt_paged_attention
    function.argtypes, function.restype = [POINTER(_Attention)], c_int
    reference = torch.no_grad()(PAGED_ATTENTION.reference)

    def paged_attention(
        query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor,
        starts: torch.Tensor, lengths: torch.Tensor, scale: float, window: int, softcap: float,
        sinks: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        tokens, heads, dim = query.shape
        _, kv_heads, size, value_dim = values.shape
        if max(dim, value_dim) > MOST_DIM or heads // kv_heads > MOST_GROUP:
            return reference(  # type: ignore[no-any-return]
                query, keys, values, tables, starts, lengths, scale, window, softcap, sinks
            )
        out = query.new_empty(tokens, heads, value_dim)
        dense = None if sinks is None else sinks.contiguous()  # kept until the kernel is done
        call = _Attention(
            query.data_ptr(), keys.data_ptr(), values.data_ptr(),
            tables.data_ptr(), starts.data_ptr(), lengths.data_ptr(),
            None if dense is None else dense.data_ptr(), out.data_ptr(),
            query.stride(0), len(lengths), tables.shape[1], heads, kv_heads, size, dim, value_dim,
            window, scale, softcap, DTYPES[query.dtype], torch.get_num_threads(),
        )  # fmt: skip
        succeed(function(byref(call)))
        return out

    return paged_attention


def bind_add_rms_norm(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``add_rms_norm``."""
    function = library.dt_add_rms_norm
    function.argtypes = [*[pointer] * 4, c_int, c_int64, c_int64, c_float, c_int]
    function.restype = None

    def add_rms_norm(
        residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        out = torch.empty_like(residual)
        rows, dim = residual.shape
        function(
            residual.data_ptr(), None if delta is None else delta.data_ptr(), weight.data_ptr(),
            out.data_ptr(), DTYPES[out.dtype], rows, dim, eps, threads_for(rows * dim),
        )  # fmt: skip
        return out

    return add_rms_norm


def bind_rotary_to_cache(library: ctypes.CDLL) -> Callable[..., None]:
    """``rotary_to_cache``."""
    function = library.dt_rotary_to_cache
    function.argtypes = [*[pointer] * 6, c_int, *[c_int64] * 6, c_int]
    function.restype = None

    def rotary_to_cache(
        joined: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, keys: torch.Tensor,
        values: torch.Tensor, slots: torch.Tensor,
    ) -> None:  # fmt: skip
        tokens, width = joined.shape
        _, kv_heads, size, dim = keys.shape
        function(
            joined.data_ptr(), cosine.data_ptr(), sine.data_ptr(), keys.data_ptr(),
            values.data_ptr(), slots.data_ptr(), DTYPES[joined.dtype], tokens,
            width // dim - 2 * kv_heads, kv_heads, dim, cosine.shape[1], size,
            threads_for(tokens * width),
        )  # fmt: skip

    return rotary_to_cache


def bind_gated_activation(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``gated_activation``."""
    function = library.dt_gated_activation
    function.argtypes = [pointer, pointer, c_int, c_int64, c_int64, c_int, c_int]
    function.restype = None
    kinds = {name: code for code, name in enumerate(ACTIVATIONS)}

    def gated_activation(joined: torch.Tensor, kind: str) -> torch.Tensor:
        rows, width = joined.shape[0], joined.shape[1] // 2
        out = joined.new_empty(rows, width)
        function(
            joined.data_ptr(), out.data_ptr(), DTYPES[out.dtype], rows, width, kinds[kind],
            threads_for(2 * rows * width),
        )  # fmt: skip
        return out

    return gated_activation


def bind_packed_linear(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``packed_linear``."""
    function = library.dt_packed_linear
    function.argtypes = [*[pointer] * 4, c_int, *[c_int64] * 3, c_int]
    function.restype = None

    def packed_linear(
        x: torch.Tensor, panels: torch.Tensor, bias: torch.Tensor | None, outputs: int
    ) -> torch.Tensor:
        _, words, _, word = panels.shape
        if x.shape[1] != words * word:
            x = torch.nn.functional.pad(x, (0, words * word - x.shape[1]))
        out = x.new_empty(len(x), outputs)
        function(
            x.data_ptr(), panels.data_ptr(), None if bias is None else bias.data_ptr(),
            out.data_ptr(), DTYPES[x.dtype], len(x), words * word, outputs,
            threads_for(panels.numel()),
        )  # fmt: skip
        return out

    return packed_linear


def bind_quantized_linear(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``quantized_linear``."""
    function = library.dt_quantized_linear
    function.argtypes = [
        pointer, c_int, pointer, pointer, c_int, c_int64, pointer, *[c_int64] * 3, c_int,
    ]  # fmt: skip
    function.restype = c_int

    def quantized_linear(
        x: torch.Tensor, codes: torch.Tensor, parameters: torch.Tensor, format: str, block: int,
        symmetric: bool, outputs: int,
    ) -> torch.Tensor:  # fmt: skip
        out = x.new_empty(len(x), outputs)
        succeed(
            function(
                x.data_ptr(), DTYPES[x.dtype], codes.data_ptr(), parameters.data_ptr(),
                CODES[format, symmetric], block, out.data_ptr(), len(x), x.shape[1], outputs,
                threads_for(x.shape[1] * outputs),
            )
        )  # fmt: skip
        return out

    return quantized_linear


def bind_block_linear(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``block_linear``."""
    function = library.dt_block_linear
    function.argtypes = [pointer, c_int, POINTER(_BlockWeight), pointer, c_int64, c_int]
    function.restype = c_int

    def block_linear(
        x: torch.Tensor, codes: torch.Tensor, parameters: torch.Tensor, bits: int, outputs: int
    ) -> torch.Tensor:
        out = x.new_empty(len(x), outputs)
        weight = _BlockWeight(
            codes.data_ptr(), parameters.data_ptr(), x.shape[1], outputs,
            codes.shape[2] * 32 // bits, codes.shape[1], bits, parameters.shape[2] == 2,
        )  # fmt: skip
        threads = threads_for(codes.numel())
        succeed(
            function(x.data_ptr(), DTYPES[x.dtype], byref(weight), out.data_ptr(), len(x), threads)
        )
        return out

    return block_linear


def bind_minifloat_linear(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``minifloat_linear``."""
    function = library.dt_minifloat_linear
    function.argtypes = [
        pointer, c_int, pointer, pointer, c_int, pointer, *[c_int64] * 3, c_int,
    ]  # fmt: skip
    function.restype = c_int

    def minifloat_linear(
        x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, format: str
    ) -> torch.Tensor:
        rows, inputs = x.shape
        out = x.new_empty(rows, len(scales))
        succeed(
            function(
                x.data_ptr(), DTYPES[x.dtype], codes.data_ptr(), scales.data_ptr(),
                format == "fp6_e3m2", out.data_ptr(), rows, inputs, len(scales),
                threads_for(codes.numel()),
            )
        )  # fmt: skip
        return out

    return minifloat_linear


BINDINGS: dict[str, Bind] = {
    "add_rms_norm": bind_add_rms_norm,
    "block_linear": bind_block_linear,
    "gated_activation": bind_gated_activation,
    "minifloat_linear": bind_minifloat_linear,
    "packed_linear": bind_packed_linear,
    "paged_attention": bind_paged_attention,
    "quantized_linear": bind_quantized_linear,
    "rotary_to_cache": bind_rotary_to_cache,
}
"""Op name -> what makes the function, given the library."""
