"""Codes of a few bits packed densely into words of 32 bits."""

from __future__ import annotations

import torch


def pack_words(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack codes [rows, n] of ``bits`` (2 to 8) each, the first one lowest, across words.

    Args:
        codes: values from 0 to 2^bits - 1, any integer dtype.
        bits: of a code.

    Returns:
        int32 [rows, ceil(n * bits / 32)]; bits that are left over are 0.
    """
    rows, count = codes.shape
    whole = -(-count * bits // 32)
    wide = torch.nn.functional.pad(codes.to(torch.int64), (0, -count % 32))
    wide = wide.view(rows, -1, 32)
    words = torch.zeros(rows, wide.shape[1], bits + 1, dtype=torch.int64)
    for at in range(32):
        word, shift = divmod(at * bits, 32)
        spread = wide[:, :, at] << shift
        words[:, :, word] |= spread & 0xFFFFFFFF
        words[:, :, word + 1] |= spread >> 32
    flat = words[:, :, :bits].flatten(1)[:, :whole]
    return torch.where(flat >= 2**31, flat - 2**32, flat).to(torch.int32)


def unpack_words(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Codes [rows, count], int64, of :func:`pack_words`."""
    wide = words.to(torch.int64) & 0xFFFFFFFF
    wide = torch.nn.functional.pad(wide, (0, -wide.shape[1] % bits + 1))
    start = torch.arange(count) * bits
    word, shift = start // 32, start % 32
    pair = wide[:, word] | (wide[:, word + 1] << 32)
    codes: torch.Tensor = (pair >> shift) & (2**bits - 1)
    return codes
