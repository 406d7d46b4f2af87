"""Calls of the kernels in signs.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int, c_int64
from ctypes import c_void_p as pointer

import torch

from drivetrain_cpu.kernels.call import Bind, threads_for


def bind_pack(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``pack_signs``."""
    function = library.dt_pack_signs
    function.argtypes = [pointer, c_float, pointer, pointer, c_int64, c_int]
    function.restype = None

    def pack(values: torch.Tensor, scale: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
        numel = values.numel()
        packed = torch.empty(-(-numel // 8), dtype=torch.uint8)
        places = values.data_ptr(), scale.item(), error.data_ptr(), packed.data_ptr()
        function(*places, numel, threads_for(numel))
        return packed

    return pack


def bind_mean(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``mean_signs``."""
    function = library.dt_mean_signs
    function.argtypes = [pointer, pointer, c_int64, c_int64, pointer, c_int]
    function.restype = None

    def mean(packed: torch.Tensor, scales: torch.Tensor, numel: int) -> torch.Tensor:
        values, sources = torch.empty(numel), len(packed)
        places = packed.data_ptr(), scales.data_ptr(), sources, numel, values.data_ptr()
        function(*places, threads_for(numel * sources))
        return values

    return mean


BINDINGS: dict[str, Bind] = {"mean_signs": bind_mean, "pack_signs": bind_pack}
"""Op name -> what makes the function, given the library."""
