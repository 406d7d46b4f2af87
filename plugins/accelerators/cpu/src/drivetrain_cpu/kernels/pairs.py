"""Calls of the kernel in pairs.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int, c_int64
from ctypes import c_void_p as pointer

import torch

from drivetrain_cpu.kernels.call import DTYPES, Bind, succeed, threads_for


def bind_pair_linear(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``pair_linear``."""
    function = library.dt_pair_linear
    function.argtypes = [pointer, c_int, *[pointer] * 3, *[c_int64] * 3, c_int]
    function.restype = c_int

    def pair_linear(
        x: torch.Tensor, values: torch.Tensor, places: torch.Tensor, outputs: int
    ) -> torch.Tensor:
        rows, inputs = x.shape
        out = x.new_empty(rows, outputs)
        succeed(
            function(
                x.data_ptr(), DTYPES[x.dtype], values.data_ptr(), places.data_ptr(),
                out.data_ptr(), rows, inputs, outputs, threads_for(values.numel()),
            )
        )  # fmt: skip
        return out

    return pair_linear


BINDINGS: dict[str, Bind] = {"pair_linear": bind_pair_linear}
"""Op name -> what makes the function, given the library."""
