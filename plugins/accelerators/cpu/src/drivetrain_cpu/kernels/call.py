"""What the calls into the native kernels share."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Sequence
from ctypes import c_int32, c_int64
from ctypes import c_void_p as pointer
from typing import Any

import torch

Bind = Callable[[ctypes.CDLL], Callable[..., Any]]
"""Makes an op's function, given the library."""
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Codes of ``Dtype`` in tiles.h."""
WORTH_A_THREAD = 32768
"""Elements for which waking one more thread pays."""


def all_native(arguments: Sequence[Any]) -> bool:
    """Whether no tensor is float64, nor is to be; only the references compute in it."""
    for value in arguments:
        if value is torch.float64:
            return False
        for tensor in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(tensor, torch.Tensor) and tensor.dtype == torch.float64:
                return False
    return True


def threads_for(numel: int) -> int:
    """Threads worth using for ``numel`` elements, at most torch's."""
    return max(1, min(torch.get_num_threads(), numel // WORTH_A_THREAD))


def product(scale_tensor: torch.Tensor | None, scale: float) -> float:
    """``scale * scale_tensor`` as float32 multiplies, like the references."""
    if scale_tensor is None:
        return scale
    return float(torch.tensor(scale, dtype=torch.float32) * scale_tensor.reshape(()).float())


def table(tensors: Sequence[torch.Tensor]) -> tuple[Any, Any, Any]:
    """Arrays of addresses, dtypes and sizes."""
    number = len(tensors)
    return (
        (pointer * number)(*[tensor.data_ptr() for tensor in tensors]),
        (c_int32 * number)(*[DTYPES[tensor.dtype] for tensor in tensors]),
        (c_int64 * number)(*[tensor.numel() for tensor in tensors]),
    )


def succeed(status: int) -> None:
    """Raise what a kernel's status says.

    Raises:
        MemoryError: scratch memory could not be allocated.
    """
    if status != 0:
        raise MemoryError("a CPU kernel could not allocate its scratch memory")
