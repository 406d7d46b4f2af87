"""Calls of the norm in norms.cu and of the copies in copies.cu."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float, c_int, c_int64, c_uint64
from ctypes import c_void_p as pointer
from typing import Any

import torch

from drivetrain_kernels.gpu.call import DTYPES, Kernels, address, on_device, table
from drivetrain_kernels.ops.copy import CAST_COPY, UNFLATTEN
from drivetrain_kernels.ops.norm import NORM_SQUARED


def bind_norm_squared(
    kernels: Kernels,
) -> Callable[[list[torch.Tensor]], tuple[torch.Tensor, torch.Tensor]]:
    """``norm_squared``; strided tensors are copied first."""
    sums_needed = kernels.plain("dt_norm_sums", [c_int64], c_int64)
    function = kernels.function(
        "dt_norm_squared", [pointer, pointer, pointer, c_int64, pointer, pointer, pointer]
    )

    def norm_squared(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
        if not tensors:
            return NORM_SQUARED.reference(tensors)  # type: ignore[no-any-return]
        device = tensors[0].device
        dense = [tensor.contiguous() for tensor in tensors]
        sums = torch.empty(sums_needed(len(dense)), dtype=torch.float64, device=device)
        total = torch.empty((), dtype=torch.float64, device=device)
        overflow = torch.empty((), dtype=torch.bool, device=device)
        results = (sums.data_ptr(), total.data_ptr(), overflow.data_ptr())
        function(device, *table(dense), len(dense), *results)
        return total, overflow

    return norm_squared


def bind_cast_copy(kernels: Kernels) -> Callable[..., None]:
    """``cast_copy``; strided tensors are left to the reference."""
    function = kernels.function(
        "dt_cast_copy",
        [pointer, c_int, pointer, c_int, c_int64, c_int, c_float, pointer, c_int, c_uint64],
    )
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
        factor = on_device(scale_tensor)
        scaled = factor is not None or scale != 1.0
        function(
            target.device, target.data_ptr(), DTYPES[target.dtype], source.data_ptr(),
            DTYPES[source.dtype], target.numel(), scaled, scale, address(factor),
            seed is not None, seed or 0,
        )  # fmt: skip

    return cast_copy


def bind_flatten(kernels: Kernels) -> Callable[..., None]:
    """``flatten``; strided tensors are copied first."""
    function = kernels.function("dt_flatten", [pointer, c_int, pointer, pointer, pointer, c_int64])

    def flatten(flat: torch.Tensor, tensors: list[torch.Tensor]) -> None:
        dense = [tensor.contiguous() for tensor in tensors]
        function(flat.device, flat.data_ptr(), DTYPES[flat.dtype], *table(dense), len(dense))

    return flatten


def bind_unflatten(kernels: Kernels) -> Callable[..., None]:
    """``unflatten``; strided tensors are left to the reference."""
    function = kernels.function(
        "dt_unflatten", [pointer, c_int, pointer, pointer, pointer, c_int64]
    )
    reference = torch.no_grad()(UNFLATTEN.reference)

    def unflatten(tensors: list[torch.Tensor], flat: torch.Tensor) -> None:
        if not all(tensor.is_contiguous() for tensor in tensors):
            reference(tensors, flat)
            return
        function(flat.device, flat.data_ptr(), DTYPES[flat.dtype], *table(tensors), len(tensors))

    return unflatten


BINDINGS: dict[str, Callable[[Kernels], Callable[..., Any]]] = {
    "cast_copy": bind_cast_copy,
    "flatten": bind_flatten,
    "norm_squared": bind_norm_squared,
    "unflatten": bind_unflatten,
}
"""Op name -> what makes the function, given the kernels."""
