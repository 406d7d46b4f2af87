"""What the calls into the GPU kernels share."""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from ctypes import c_int, c_int32, c_int64
from ctypes import c_void_p as pointer
from typing import Any

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""Codes of ``Dtype`` in values.h."""

Streams = Callable[[torch.device], AbstractContextManager[int]]
"""Makes a device current and answers the handle of its current stream."""


class Kernels:
    """A loaded library, and the streams that its kernels are queued on.

    Args:
        library: the GPU library.
        streams: the stream to use on a device.
    """

    def __init__(self, library: ctypes.CDLL, streams: Streams) -> None:
        self._library = library
        self._streams = streams
        library.dt_status.argtypes = [c_int]
        library.dt_status.restype = ctypes.c_char_p

    def function(self, name: str, argument_types: Sequence[Any]) -> Callable[..., None]:
        """``function(device, *arguments)`` queues the kernels of one entry of the library.

        What it queues reads and writes memory later, on the stream, in the order of the calls.
        """
        call = getattr(self._library, name)
        call.argtypes = [*argument_types, pointer]
        call.restype = c_int

        def run(device: torch.device, *arguments: Any) -> None:
            with self._streams(device) as stream:
                status = call(*arguments, stream)
            if status != 0:
                words = self._library.dt_status(status).decode()
                raise RuntimeError(f"{name} could not be queued on {device}: {words}")

        return run

    def plain(self, name: str, argument_types: Sequence[Any], result_type: Any) -> Any:
        """An entry of the library that queues nothing."""
        call = getattr(self._library, name)
        call.argtypes = list(argument_types)
        call.restype = result_type
        return call


@contextmanager
def current_stream(device: torch.device) -> Iterator[int]:
    """The stream that torch queues work on, for devices of type ``cuda`` (CUDA and ROCm)."""
    with torch.cuda.device(device):
        yield torch.cuda.current_stream(device).cuda_stream


def all_native(arguments: Sequence[Any]) -> bool:
    """Whether no tensor is float64, or should become it: only the references compute in it."""
    for value in arguments:
        for each in value if isinstance(value, (list, tuple)) else (value,):
            if (each.dtype if isinstance(each, torch.Tensor) else each) is torch.float64:
                return False
    return True


def on_device(scale_tensor: torch.Tensor | None) -> torch.Tensor | None:
    """A scale as kernels read it: one float32 in device memory, or ``None``."""
    return None if scale_tensor is None else scale_tensor.float().reshape(())


def address(tensor: torch.Tensor | None) -> int | None:
    """Where a tensor lies; ``None`` stays."""
    return None if tensor is None else tensor.data_ptr()


def table(tensors: Sequence[torch.Tensor]) -> tuple[Any, Any, Any]:
    """Arrays of addresses, dtypes and sizes; the library copies them before it returns."""
    number = len(tensors)
    return (
        (pointer * number)(*[tensor.data_ptr() for tensor in tensors]),
        (c_int32 * number)(*[DTYPES[tensor.dtype] for tensor in tensors]),
        (c_int64 * number)(*[tensor.numel() for tensor in tensors]),
    )
