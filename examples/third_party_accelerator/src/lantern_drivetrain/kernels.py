"""One kernel, for the optimizer Lion; every other operator stays with whoever else has it.

The entry point's name is the device type that the kernels are for, and ``accelerator`` says that
they count only while Lantern is active. Without it they would claim to be the CPU's own, and be
refused beside drivetrain-cpu's.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from drivetrain_kernels import Op, Provider, ops
from drivetrain_kernels.native import NativeLibrary

accelerator = "lantern"

SOURCE = Path(__file__).with_name("lion.cpp")
LIBRARY = NativeLibrary("lantern_lion", [SOURCE], flags=["-O3", "-fPIC", "-ffp-contract=off"])


def register(provider: Provider) -> None:
    """Called before the first dispatch; builds and loads nothing yet."""
    (lion,) = (op for op in ops() if op.name == "lion")
    provider.implement_native("lion", LIBRARY, lambda library: bind(library, lion))


def bind(library: ctypes.CDLL, op: Op) -> Callable[..., None]:
    """The operator's function: float32 runs natively, all else as the reference does it."""
    native = library.lantern_lion
    native.argtypes = [c_void_p] * 3 + [c_int64] + [c_float] * 5
    native.restype = None
    reference = torch.no_grad()(op.reference)

    def lion(*arguments: Any) -> None:
        weights, gradient, momentum, out, scale_tensor, scale, seed, *hyper = arguments
        tensors = (weights, gradient, momentum)
        if out is not None or seed is not None or any(t.dtype != torch.float32 for t in tensors):
            reference(*arguments)
            return
        if scale_tensor is not None:
            scale *= float(scale_tensor)
        native(*(t.data_ptr() for t in tensors), weights.numel(), scale, *hyper)

    return lion
