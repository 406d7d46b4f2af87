"""Calls of the kernels in quantization.cu."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_float, c_int, c_int64
from ctypes import c_void_p as pointer
from typing import Any

import torch

from drivetrain_kernels.gpu.call import DTYPES, Kernels
from drivetrain_kernels.ops.block_format import blocks_of, code_count, format_of

FORMATS = {
    ("int8", True): 0,
    ("int8", False): 1,
    ("int4", True): 2,
    ("int4", False): 3,
    ("fp8_e4m3", True): 4,
    ("fp8_e5m2", True): 5,
}
"""Codes of ``Format`` in quantization.cu."""


def bind_quantize(kernels: Kernels) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """``quantize``; strided tensors are copied first."""
    function = kernels.function(
        "dt_quantize", [pointer, c_int, c_int, c_int64, c_int64, pointer, pointer]
    )

    def quantize(
        values: torch.Tensor, format: str, block: int, symmetric: bool
    ) -> tuple[torch.Tensor, torch.Tensor]:
        dense, kind, numel = values.contiguous(), format_of(format, symmetric), values.numel()
        device = values.device
        codes = torch.empty(code_count(numel, kind), dtype=kind.dtype, device=device)
        parameters = torch.empty(blocks_of(numel, block), kind.parameters, device=device)
        function(
            device, dense.data_ptr(), DTYPES[dense.dtype], FORMATS[format, symmetric], numel,
            block, codes.data_ptr(), parameters.data_ptr(),
        )  # fmt: skip
        return codes, parameters

    return quantize


def bind_dequantize(kernels: Kernels) -> Callable[..., torch.Tensor]:
    """``dequantize``."""
    function = kernels.function(
        "dt_dequantize", [pointer, pointer, c_int, c_int64, c_int64, pointer, c_int]
    )

    def dequantize(
        codes: torch.Tensor, parameters: torch.Tensor, format: str, block: int, symmetric: bool,
        numel: int, dtype: torch.dtype,
    ) -> torch.Tensor:  # fmt: skip
        values = torch.empty(numel, dtype=dtype, device=codes.device)
        function(
            codes.device, codes.data_ptr(), parameters.data_ptr(), FORMATS[format, symmetric],
            numel, block, values.data_ptr(), DTYPES[dtype],
        )  # fmt: skip
        return values

    return dequantize


def bind_reduce(kernels: Kernels) -> Callable[..., tuple[torch.Tensor, torch.Tensor]]:
    """``dequantize_reduce_quantize``."""
    function = kernels.function(
        "dt_dequantize_reduce_quantize",
        [pointer, pointer, c_int64, c_int, c_int64, c_int64, c_float, pointer, pointer],
    )

    def reduce(
        codes: torch.Tensor, parameters: torch.Tensor, format: str, block: int, symmetric: bool,
        numel: int, scale: float,
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        summed, summed_parameters = torch.empty_like(codes[0]), torch.empty_like(parameters[0])
        function(
            codes.device, codes.data_ptr(), parameters.data_ptr(), len(codes),
            FORMATS[format, symmetric], numel, block, scale, summed.data_ptr(),
            summed_parameters.data_ptr(),
        )  # fmt: skip
        return summed, summed_parameters

    return reduce


BINDINGS: dict[str, Callable[[Kernels], Callable[..., Any]]] = {
    "dequantize": bind_dequantize,
    "dequantize_reduce_quantize": bind_reduce,
    "quantize": bind_quantize,
}
"""Op name -> what makes the function, given the kernels."""
