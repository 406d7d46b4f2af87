"""Rounding to storage dtypes: to nearest, or stochastically from a counter-based generator.

Stochastic rounding to bfloat16 adds 16 random bits below the kept ones and truncates, so the
expectation is the unrounded value. The bits come from Philox4x32 with 7 rounds (Salmon et al.,
"Parallel random numbers: as easy as 1, 2, 3", SC 2011, section 5), a pure function of
(seed, stream, element): any implementation can reproduce any element on its own.

Element ``i`` lies in group ``g = i // 64`` at ``w = (i % 64) // 16`` and ``j = i % 16``; its 32
bits are word ``w`` of ``Philox(counter=(16 g + j, stream // 2), key=seed)``, an order in which 16
vector lanes need no shuffling. Even streams use the low 16 bits, odd ones the high 16 bits.
"""

from __future__ import annotations

import torch

ROUNDS = 7
_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)


def store(target: torch.Tensor, values: torch.Tensor, seed: int | None, stream: int) -> None:
    """Write ``values`` into ``target``, rounding stochastically if ``seed`` is given.

    Args:
        target: flat [n], any floating dtype.
        values: flat [n], in the dtype of the computation.
        seed: key of the generator, or ``None`` to round to nearest.
        stream: which of the independent streams of ``seed`` to use.
    """
    if seed is None or target.dtype != torch.bfloat16:
        target.copy_(values)
    else:
        target.copy_(stochastic_bfloat16(values.to(torch.float32), seed, stream))


def stochastic_bfloat16(values: torch.Tensor, seed: int, stream: int = 0) -> torch.Tensor:
    """``values`` (float32, flat) rounded stochastically; infinities and NaN stay what they are."""
    bits = values.contiguous().view(torch.int32).to(torch.int64) & _MASK
    bits = (bits + random_bits(values.numel(), seed, stream, values.device)) >> 16
    # int64 -> int16 keeps the low 16 bits, which are the bfloat16.
    rounded = bits.to(torch.int16).view(torch.bfloat16)
    return torch.where(torch.isfinite(values), rounded, values.to(torch.bfloat16))


def random_bits(count: int, seed: int, stream: int, device: torch.device) -> torch.Tensor:
    """``count`` random integers in [0, 2**16) as int64, those of elements 0, 1, ..."""
    element = torch.arange(count, dtype=torch.int64, device=device)
    group, within = element // 64, element % 64
    words = philox(16 * group + within % 16, stream // 2, seed)
    word = torch.stack(words).gather(0, (within // 16).unsqueeze(0)).squeeze(0)
    return (word >> 16) if stream % 2 else (word & 0xFFFF)


def philox(counter: torch.Tensor, stream: int, seed: int) -> tuple[torch.Tensor, ...]:
    """Philox4x32-7: four 32-bit words (as int64 [n]) per counter [n]."""
    zero = torch.zeros_like(counter)
    words = [counter & _MASK, counter >> 32, zero + stream, zero]
    keys = [seed & _MASK, (seed >> 32) & _MASK]
    for _ in range(ROUNDS):
        high0, low0 = _wide_product(words[0], _MULTIPLIERS[0])
        high1, low1 = _wide_product(words[2], _MULTIPLIERS[1])
        words = [high1 ^ words[1] ^ keys[0], low1, high0 ^ words[3] ^ keys[1], low0]
        keys = [(key + weyl) & _MASK for key, weyl in zip(keys, _WEYL, strict=True)]
    return tuple(words)


def _wide_product(words: torch.Tensor, multiplier: int) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of the 64-bit product; the int64 product wraps, its bits are right."""
    product = words * multiplier
    return (product >> 32) & _MASK, product & _MASK
