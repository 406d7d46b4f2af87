"""Codes of a few bits packed densely into words of 32 bits."""

from __future__ import annotations

import torch
from drivetrain_kernels import pack_codes, unpack_codes


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes [rows, n] of ``bits`` (2 to 8) each, the first one lowest, across words.

    Args:
        codes: values from 0 to 2^bits - 1, any integer dtype.
        bits: of a code.

    Returns:
        int32 [rows, ceil(n * bits / 32)]; bits that are left over are 0.
    """
    return pack_codes(codes.to(torch.uint8).contiguous(), bits)


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Codes [rows, count], int64, of :func:`pack_words`."""
    return unpack_codes(words.contiguous(), bits, count).to(torch.int64)
