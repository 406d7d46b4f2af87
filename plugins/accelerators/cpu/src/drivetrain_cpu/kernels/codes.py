"""Calls of the kernels in codes.cpp and fake_quantization.cpp."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from ctypes import c_int, c_int64
from ctypes import c_void_p as pointer

import torch
from drivetrain_kernels.ops.codes import words_of

from drivetrain_cpu.kernels.call import DTYPES, Bind, threads_for


def bind_pack(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``pack_codes``."""
    function = library.dt_pack_codes
    function.argtypes = [pointer, c_int64, c_int64, c_int, pointer, c_int]
    function.restype = None

    def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
        rows, count = codes.shape
        words = torch.empty(rows, words_of(count, bits), dtype=torch.int32)
        threads = threads_for(codes.numel())
        function(codes.data_ptr(), rows, count, bits, words.data_ptr(), threads)
        return words

    return pack


def bind_unpack(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``unpack_codes``."""
    function = library.dt_unpack_codes
    function.argtypes = [pointer, c_int64, c_int64, c_int, pointer, c_int]
    function.restype = None

    def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
        codes = torch.empty(len(words), count, dtype=torch.uint8)
        threads = threads_for(codes.numel())
        function(words.data_ptr(), len(words), count, bits, codes.data_ptr(), threads)
        return codes

    return unpack


def bind_fake_quantize(library: ctypes.CDLL) -> Callable[..., torch.Tensor]:
    """``fake_quantize``."""
    function = library.dt_fake_quantize
    function.argtypes = [pointer, c_int, c_int64, c_int64, c_int, c_int, pointer, c_int]
    function.restype = None

    def fake_quantize(groups: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
        rounded, (number, size) = torch.empty_like(groups), groups.shape
        kind, threads = DTYPES[groups.dtype], threads_for(groups.numel())
        places = groups.data_ptr(), kind, number, size, bits, int(symmetric), rounded.data_ptr()
        function(*places, threads)
        return rounded

    return fake_quantize


BINDINGS: dict[str, Bind] = {
    "fake_quantize": bind_fake_quantize,
    "pack_codes": bind_pack,
    "unpack_codes": bind_unpack,
}
"""Op name -> what makes the function, given the library."""
