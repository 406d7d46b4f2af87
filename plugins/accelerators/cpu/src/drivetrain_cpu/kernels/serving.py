"""Calls of the kernels for serving, in attention.cpp, decoder.cpp and the files of products.

Each kernel takes the address of one structure, so that a call can be noted and made again
(:mod:`drivetrain_cpu.kernels.program`).
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import Structure, c_float, c_int32, c_int64
from ctypes import c_void_p as pointer
from typing import Any

import torch
from drivetrain_kernels.ops.decoder import ACTIVATIONS
from drivetrain_kernels.ops.paged_attention import PAGED_ATTENTION

from drivetrain_cpu.kernels.call import DTYPES, Bind, threads_for
from drivetrain_cpu.kernels.program import Native

MOST_DIM, MOST_GROUP = 256, 48
"""Elements of a head, and query heads per head of keys, that the kernel has scratch memory for."""
CODES = {("int8", True): 0, ("int8", False): 1, ("int4", True): 2, ("int4", False): 3}
"""Codes of ``Codes`` in linear.cpp."""
CACHES = {torch.int8: 1, torch.uint8: 2}
"""Codes of ``CacheFormat`` in bytes.h; other dtypes are those of the queries."""


def _fields(pointers: str, sizes: str, numbers: str, whole: str) -> list[tuple[str, Any]]:
    """Fields of a structure: addresses, 64-bit integers, float32 and 32-bit integers."""
    kinds = zip(
        (pointers, sizes, numbers, whole), (pointer, c_int64, c_float, c_int32), strict=True
    )
    return [(name, kind) for names, kind in kinds for name in names.split()]


class _Attention(Structure):
    """``Attention`` of attention.cpp."""

    _fields_ = _fields(
        "query keys values key_scales value_scales tables starts lengths sinks out",
        "query_stride sequences table_stride heads kv_heads size dim value_dim window",
        "scale softcap",
        "dtype cache threads",
    )


class _Norm(Structure):
    """``Norm`` of decoder.cpp."""

    _fields_ = _fields("residual delta weight out", "rows dim", "eps", "dtype threads")


class _Rotary(Structure):
    """``Rotary`` of decoder.cpp."""

    _fields_ = _fields(
        "joined cosine sine keys values key_scales value_scales slots",
        "tokens heads kv_heads dim half size",
        "",
        "dtype cache threads",
    )


class _Gated(Structure):
    """``Gated`` of decoder.cpp."""

    _fields_ = _fields("joined out", "rows width", "", "kind dtype threads")


class _PackedProduct(Structure):
    """``PackedProduct`` of linear.cpp."""

    _fields_ = _fields("x panels bias y", "rows inputs outputs", "", "dtype threads")


class _QuantizedProduct(Structure):
    """``QuantizedProduct`` of linear.cpp."""

    _fields_ = _fields(
        "x codes parameters y", "block rows inputs outputs", "", "kind dtype threads"
    )


class _BlockWeight(Structure):
    """``BlockWeight`` of integers.cpp."""

    _fields_ = _fields("codes parameters", "inputs outputs block blocks", "", "bits offsets")


class _BlockProduct(Structure):
    """``BlockProduct`` of integers.cpp."""

    _fields_ = [
        *_fields("x y", "", "", ""),
        ("weight", _BlockWeight),
        *_fields("", "rows", "", "dtype threads"),
    ]


class _MinifloatProduct(Structure):
    """``MinifloatProduct`` of minifloats.cpp."""

    _fields_ = _fields("x codes scales y", "rows inputs outputs", "", "six_bits dtype threads")


def _address(tensor: torch.Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def bind_paged_attention(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``paged_attention``; heads that are very wide are left to the reference."""
    native = Native(library.dt_paged_attention)
    reference = torch.no_grad()(PAGED_ATTENTION.reference)

    def paged_attention(
        query: torch.Tensor, keys: torch.Tensor, values: torch.Tensor, tables: torch.Tensor,
        starts: torch.Tensor, lengths: torch.Tensor, scale: float, window: int, softcap: float,
        sinks: torch.Tensor | None, key_scales: torch.Tensor | None,
        value_scales: torch.Tensor | None,
    ) -> torch.Tensor:  # fmt: skip
        tokens, heads, dim = query.shape
        _, kv_heads, size, value_dim = values.shape
        if max(dim, value_dim) > MOST_DIM or heads // kv_heads > MOST_GROUP:
            return reference(  # type: ignore[no-any-return]
                query, keys, values, tables, starts, lengths, scale, window, softcap, sinks,
                key_scales, value_scales,
            )  # fmt: skip
        out = query.new_empty(tokens, heads, value_dim)
        dense = None if sinks is None else sinks.contiguous()  # kept until the kernel is done
        native(
            _Attention(
                query.data_ptr(), keys.data_ptr(), values.data_ptr(),
                _address(key_scales), _address(value_scales),
                tables.data_ptr(), starts.data_ptr(), lengths.data_ptr(), _address(dense),
                out.data_ptr(), query.stride(0), len(lengths), tables.shape[1], heads, kv_heads,
                size, dim, value_dim, window, scale, softcap, DTYPES[query.dtype],
                CACHES.get(keys.dtype, 0), torch.get_num_threads(),
            ),
            query, keys, values, key_scales, value_scales, tables, starts, lengths, dense, out,
        )  # fmt: skip
        return out

    return paged_attention


def bind_add_rms_norm(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``add_rms_norm``."""
    native = Native(library.dt_add_rms_norm)

    def add_rms_norm(
        residual: torch.Tensor, delta: torch.Tensor | None, weight: torch.Tensor, eps: float
    ) -> torch.Tensor:
        out = torch.empty_like(residual)
        rows, dim = residual.shape
        native(
            _Norm(
                residual.data_ptr(), _address(delta), weight.data_ptr(), out.data_ptr(), rows, dim,
                eps, DTYPES[out.dtype], threads_for(rows * dim),
            ),
            residual, delta, weight, out,
        )  # fmt: skip
        return out

    return add_rms_norm


def bind_rotary_to_cache(library: ctypes.CDLL) -> Callable[..., None]:
    """``rotary_to_cache``."""
    native = Native(library.dt_rotary_to_cache)

    def rotary_to_cache(
        joined: torch.Tensor, cosine: torch.Tensor, sine: torch.Tensor, keys: torch.Tensor,
        values: torch.Tensor, slots: torch.Tensor, key_scales: torch.Tensor | None,
        value_scales: torch.Tensor | None,
    ) -> None:  # fmt: skip
        tokens, width = joined.shape
        _, kv_heads, size, dim = keys.shape
        native(
            _Rotary(
                joined.data_ptr(), cosine.data_ptr(), sine.data_ptr(), keys.data_ptr(),
                values.data_ptr(), _address(key_scales), _address(value_scales), slots.data_ptr(),
                tokens, width // dim - 2 * kv_heads, kv_heads, dim, cosine.shape[1], size,
                DTYPES[joined.dtype], CACHES.get(keys.dtype, 0), threads_for(tokens * width),
            ),
            joined, cosine, sine, keys, values, key_scales, value_scales, slots,
        )  # fmt: skip

    return rotary_to_cache


def bind_gated_activation(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``gated_activation``."""
    native = Native(library.dt_gated_activation)
    kinds = {name: code for code, name in enumerate(ACTIVATIONS)}

    def gated_activation(joined: torch.Tensor, kind: str) -> torch.Tensor:
        rows, width = joined.shape[0], joined.shape[1] // 2
        out = joined.new_empty(rows, width)
        native(
            _Gated(
                joined.data_ptr(), out.data_ptr(), rows, width, kinds[kind], DTYPES[out.dtype],
                threads_for(2 * rows * width),
            ),
            joined, out,
        )  # fmt: skip
        return out

    return gated_activation


def bind_packed_linear(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``packed_linear``."""
    native = Native(library.dt_packed_linear)

    def packed_linear(
        x: torch.Tensor, panels: torch.Tensor, bias: torch.Tensor | None, outputs: int
    ) -> torch.Tensor:
        _, words, _, word = panels.shape
        if x.shape[1] != words * word:
            x = torch.nn.functional.pad(x, (0, words * word - x.shape[1]))
        out = x.new_empty(len(x), outputs)
        native(
            _PackedProduct(
                x.data_ptr(), panels.data_ptr(), _address(bias), out.data_ptr(), len(x),
                words * word, outputs, DTYPES[x.dtype], threads_for(panels.numel()),
            ),
            x, panels, bias, out,
        )  # fmt: skip
        return out

    return packed_linear


def bind_quantized_linear(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``quantized_linear``."""
    native = Native(library.dt_quantized_linear)

    def quantized_linear(
        x: torch.Tensor, codes: torch.Tensor, parameters: torch.Tensor, format: str, block: int,
        symmetric: bool, outputs: int,
    ) -> torch.Tensor:  # fmt: skip
        rows, inputs = x.shape
        out = x.new_empty(rows, outputs)
        native(
            _QuantizedProduct(
                x.data_ptr(), codes.data_ptr(), parameters.data_ptr(), out.data_ptr(), block, rows,
                inputs, outputs, CODES[format, symmetric], DTYPES[x.dtype],
                threads_for(inputs * outputs),
            ),
            x, codes, parameters, out,
        )  # fmt: skip
        return out

    return quantized_linear


def bind_block_linear(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``block_linear``."""
    native = Native(library.dt_block_linear)

    def block_linear(
        x: torch.Tensor, codes: torch.Tensor, parameters: torch.Tensor, bits: int, outputs: int
    ) -> torch.Tensor:
        rows, inputs = x.shape
        out = x.new_empty(rows, outputs)
        weight = _BlockWeight(
            codes.data_ptr(), parameters.data_ptr(), inputs, outputs,
            codes.shape[2] * 32 // bits, codes.shape[1], bits, parameters.shape[2] == 2,
        )  # fmt: skip
        native(
            _BlockProduct(
                x.data_ptr(), out.data_ptr(), weight, rows, DTYPES[x.dtype],
                threads_for(codes.numel()),
            ),
            x, codes, parameters, out,
        )  # fmt: skip
        return out

    return block_linear


def bind_minifloat_linear(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``minifloat_linear``."""
    native = Native(library.dt_minifloat_linear)

    def minifloat_linear(
        x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, format: str
    ) -> torch.Tensor:
        rows, inputs = x.shape
        out = x.new_empty(rows, len(scales))
        native(
            _MinifloatProduct(
                x.data_ptr(), codes.data_ptr(), scales.data_ptr(), out.data_ptr(), rows, inputs,
                len(scales), format == "fp6_e3m2", DTYPES[x.dtype], threads_for(codes.numel()),
            ),
            x, codes, scales, out,
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
