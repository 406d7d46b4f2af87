"""Calls of the norm in reductions.cpp and of the copies in copies.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import POINTER, byref, c_double, c_float, c_int, c_int64, c_uint64
from ctypes import c_void_p as pointer

import torch
from drivetrain_kernels.ops.copy import CAST_COPY, UNFLATTEN

from drivetrain_cpu.kernels.call import DTYPES, Bind, product, succeed, table, threads_for


def bind_norm_squared(
    library: ctypes.CDLL,
) -> Callable[[list[torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]:
    """``norm_squared``; strided tensors are copied first."""
    function = library.dt_norm_squared
    function.argtypes = [pointer, pointer, pointer, c_int64, c_int, POINTER(c_double)]
    function.restype = c_int

    def norm_squared(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        dense = [tensor.contiguous() for tensor in tensors]
        total = c_double()
        threads = threads_for(max((tensor.numel() for tensor in dense), default=0))
        succeed(function(*table(dense), len(dense), threads, byref(total)))
        result = torch.tensor(total.value, dtype=torch.float64)
        return result, ~torch.isfinite(result)

    return norm_squared


def bind_cast_copy(library: ctypes.CDLL) -> Callable[..., None]:
    """``cast_copy``; strided tensors are left to the reference."""
    function = library.dt_cast_copy
    function.argtypes = [
        pointer, c_int, pointer, c_int, c_int64, c_int, c_float, c_int, c_uint64, c_int,
    ]  # fmt: skip
    function.restype = None
    reference = torch.no_grad()(CAST_COPY.reference)

    def cast_copy(
        target: torch.Tensor,
        source: torch.Tensor,
        scale_tensor: torch.Tensor | None,
        scale: float,
        seed: int | None,
    ) -> None:
        if not (target.is_contiguous() and source.is_contiguous()):
            reference(target, source, scale_tensor, scale, seed)
            return
        scaled = scale_tensor is not None or scale != 1.0
        function(
            target.data_ptr(), DTYPES[target.dtype], source.data_ptr(), DTYPES[source.dtype],
            target.numel(), scaled, product(scale_tensor, scale), seed is not None, seed or 0,
            threads_for(target.numel()),
        )  # fmt: skip

    return cast_copy


def bind_flatten(library: ctypes.CDLL) -> Callable[..., None]:
    """``flatten``; strided tensors are copied first."""
    function = library.dt_flatten
    function.argtypes = [pointer, c_int, pointer, pointer, pointer, c_int64, c_int]
    function.restype = None

    def flatten(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
        dense = [tensor.contiguous() for tensor in tensors]
        function(
            flat.data_ptr(),
            DTYPES[flat.dtype],
            *table(dense),
            len(dense),
            threads_for(flat.numel()),
        )

    return flatten


def bind_unflatten(library: ctypes.CDLL) -> Callable[..., None]:
    """``unflatten``; strided tensors are left to the reference."""
    function = library.dt_unflatten
    function.argtypes = [pointer, c_int, pointer, pointer, pointer, c_int64, c_int]
    function.restype = None
    reference = torch.no_grad()(UNFLATTEN.reference)

    def unflatten(tensors: list[torch.Tensor], flat: torch.Tensor) -> None:
        if not all(tensor.is_contiguous() for tensor in tensors):
            reference(tensors, flat)
            return
        threads = threads_for(flat.numel())
        function(flat.data_ptr(), DTYPES[flat.dtype], *table(tensors), len(tensors), threads)

    return unflatten


BINDINGS: dict[str, Bind] = {
    "cast_copy": bind_cast_copy,
    "flatten": bind_flatten,
    "norm_squared": bind_norm_squared,
    "unflatten": bind_unflatten,
}
"""Op name -> what makes the function, given the library."""
