"""Calls of the kernels in codes.cu."""

from __future__ import annotations

from collections.abc import Callable
from ctypes import c_int, c_int64
from ctypes import c_void_p as pointer
from typing import Any

import torch

from drivetrain_kernels.gpu.call import DTYPES, Kernels
from drivetrain_kernels.ops.codes import words_of


def bind_fake_quantize(kernels: Kernels) -> Callable[..., torch.Tensor]:
    """``fake_quantize``."""
    function = kernels.function(
        "dt_fake_quantize", [pointer, c_int, c_int64, c_int64, c_int, c_int, pointer, pointer]
    )
    scratch_bytes = kernels.plain("dt_fake_quantize_scratch", [c_int64, c_int64], c_int64)

    def fake_quantize(groups: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
        rounded = torch.empty_like(groups)
        if not groups.numel():
            return rounded
        nbytes = scratch_bytes(*groups.shape)
        scratch = torch.empty(nbytes, dtype=torch.uint8, device=groups.device)
        function(
            groups.device, groups.data_ptr(), DTYPES[groups.dtype], *groups.shape, bits,
            int(symmetric), rounded.data_ptr(), scratch.data_ptr(),
        )  # fmt: skip
        return rounded

    return fake_quantize


def bind_pack(kernels: Kernels) -> Callable[..., torch.Tensor]:
    """``pack_codes``."""
    function = kernels.function("dt_pack_codes", [pointer, c_int64, c_int64, c_int, pointer])

    def pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
        rows, count = codes.shape
        words = torch.empty(rows, words_of(count, bits), dtype=torch.int32, device=codes.device)
        function(codes.device, codes.data_ptr(), rows, count, bits, words.data_ptr())
        return words

    return pack


def bind_unpack(kernels: Kernels) -> Callable[..., torch.Tensor]:
    """``unpack_codes``."""
    function = kernels.function("dt_unpack_codes", [pointer, c_int64, c_int64, c_int, pointer])

    def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
        rows = len(words)
        codes = torch.empty(rows, count, dtype=torch.uint8, device=words.device)
        function(words.device, words.data_ptr(), rows, count, bits, codes.data_ptr())
        return codes

    return unpack


BINDINGS: dict[str, Callable[[Kernels], Callable[..., Any]]] = {
    "fake_quantize": bind_fake_quantize,
    "pack_codes": bind_pack,
    "unpack_codes": bind_unpack,
}
"""Op name -> what makes the function, given the kernels."""
