"""Calls of the kernels in signs.cu."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int64
from ctypes import c_void_p as pointer
from typing import Any

import torch

from drivetrain_kernels.gpu.call import Kernels


def bind_pack(kernels: Kernels) -> Callable[..., torch.Tensor]:
    """``pack_signs``."""
    function = kernels.function("dt_pack_signs", [pointer, pointer, pointer, pointer, c_int64])

    def pack(values: torch.Tensor, scale: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        numel, device = values.numel(), values.device
        packed = torch.empty(-(-numel // 8), dtype=torch.uint8, device=device)
        places = values.data_ptr(), scale.data_ptr(), error.data_ptr(), packed.data_ptr()
        function(device, *places, numel)
        return packed

    return pack


def bind_mean(kernels: Kernels) -> Callable[..., torch.Tensor]:
    """``mean_signs``."""
    function = kernels.function("dt_mean_signs", [pointer, pointer, c_int64, c_int64, pointer])

    def mean(packed: torch.Tensor, scales: torch.Tensor, numel: int) -> torch.Tensor:
        values = torch.empty(numel, device=packed.device)
        places = packed.data_ptr(), scales.data_ptr(), len(packed), numel, values.data_ptr()
        function(packed.device, *places)
        return values

    return mean


BINDINGS: dict[str, Callable[[Kernels], Callable[..., Any]]] = {
    "mean_signs": bind_mean,
    "pack_signs": bind_pack,
}
"""Op name -> what makes the function, given the kernels."""
