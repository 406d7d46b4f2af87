"""Q4_K of GGUF: 256 weights in 144 bytes, that is 4.5 bits each.

A weight is ``d s q - e m`` with a code q of 4 bits, a scale s and an offset m of 6 bits for each 32
weights, and float16 numbers d and e for all 256. Source: the package ``gguf``, whose
``quants.Q4_K`` unpacks such blocks.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

BLOCK = 256
"""Weights that share d and e; rows have to be multiples."""

BYTES = 144
"""Of a block: d and e, 12 bytes with scales and offsets, 128 with codes."""

_PART, _PARTS = 32, 8
_AT_ONCE = 1 << 18
"""Weights that are searched at once, so that what is made on the way stays small."""

_SEARCH = 21
"""Ranges that are tried for 32 weights."""


def q4_k(values: torch.Tensor, *, search: int = _SEARCH) -> np.ndarray[Any, Any]:
    """Round a matrix to blocks of Q4_K.

    Scales and offsets are searched: for each of several ranges codes are chosen, the best scale and
    offset for those codes follow by least squares, and the least error stays. Larger weights count
    more, as ``|w|`` plus the root of the mean square of its 32. With the 6 bits chosen, d and e are
    fitted once more in the same way.

    Args:
        values: [rows, n], n a multiple of 256, finite.
        search: ranges that are tried; 1 takes the range that covers all.

    Returns:
        uint8 [rows, n / 256 * 144].
    """
    rows, columns = values.shape
    flat = values.detach().float().reshape(-1, BLOCK)
    step = _AT_ONCE // BLOCK
    parts = [_packed(flat[at : at + step], search) for at in range(0, len(flat), step)]
    whole = torch.cat(parts).numpy()
    return whole.reshape(rows, columns // BLOCK * BYTES)


def _packed(x: torch.Tensor, search: int) -> torch.Tensor:
    """Bytes [blocks, 144] of weights [blocks, 256]."""
    x = x.view(-1, _PARTS, _PART)
    weight = x.square().mean(2, keepdim=True).sqrt() + x.abs()
    scale, offset = _searched(x, weight, search)
    d, e = (_half(each.amax(1) / 63) for each in (scale, offset))
    scales, offsets = _six_bits(scale, d), _six_bits(offset, e)
    codes = _codes(x, d, e, scales, offsets)
    d2, e2 = (_half(each) for each in _fitted(x, weight, codes, scales, offsets))
    before = _error(x, weight, d, e, scales, offsets)
    better = _error(x, weight, d2, e2, scales, offsets) < before
    d, e = torch.where(better, d2, d), torch.where(better, e2, e)
    codes = _codes(x, d, e, scales, offsets).to(torch.uint8)
    head = torch.stack([d, e], 1).half().view(torch.uint8).view(-1, 4)
    pairs = codes.view(-1, _PARTS // 2, 2, _PART)  # 64 weights: low halves of bytes, then high ones
    packed = (pairs[:, :, 0] | (pairs[:, :, 1] << 4)).flatten(1)
    return torch.cat([head, _scale_bytes(scales, offsets), packed], 1)


def _searched(
    x: torch.Tensor, weight: torch.Tensor, search: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """The best scale and offset [blocks, 8] of 32 weights each; neither is negative."""
    low, high = x.amin(2).clamp(max=0), x.amax(2).clamp(min=0)
    extent = (high - low).clamp(min=1e-30)
    scale, offset = extent / 15, -low
    least = _part_error(x, weight, scale, offset)
    if search < 2:
        return scale, offset
    for shift in torch.linspace(-1.0, 2.0, search).tolist():
        steps = ((15 + shift) / extent)[..., None]
        codes = torch.round((x - low[..., None]) * steps).clamp(0, 15)
        found = _least_squares(x, weight, codes)
        loss = _part_error(x, weight, *found)
        better = loss < least
        least = torch.where(better, loss, least)
        scale, offset = torch.where(better, found[0], scale), torch.where(better, found[1], offset)
    return scale, offset


def _least_squares(
    x: torch.Tensor, weight: torch.Tensor, codes: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale s and offset m of each part that make ``s codes - m`` nearest; m is at least 0."""
    one, q, qq = (_sum(weight * codes**power) for power in (0, 1, 2))
    y, qy = _sum(weight * x), _sum(weight * codes * x)
    determinant = one * qq - q * q
    sound = determinant > 1e-6 * one * qq
    safe = torch.where(sound, determinant, 1.0)
    scale, offset = (one * qy - q * y) / safe, (q * qy - qq * y) / safe
    alone = qy / qq.clamp(min=1e-30)
    keeps = sound & (offset >= 0) & (scale > 0)
    return torch.where(keeps, scale, alone.clamp(min=0)), torch.where(keeps, offset, 0.0)


def _fitted(
    x: torch.Tensor,
    weight: torch.Tensor,
    codes: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor]:
    """The d and e [blocks] that are best for chosen codes; what cannot be fitted is 0."""
    a = (scales[..., None] * codes).flatten(1)
    b = -offsets[..., None].expand_as(codes).flatten(1)
    w, y = weight.flatten(1), x.flatten(1)
    aa, ab, bb = _sum(w * a * a), _sum(w * a * b), _sum(w * b * b)
    ay, by = _sum(w * a * y), _sum(w * b * y)
    determinant = aa * bb - ab * ab
    sound = determinant > 1e-6 * aa * bb
    safe = torch.where(sound, determinant, 1.0)
    d = torch.where(sound, (bb * ay - ab * by) / safe, ay / aa.clamp(min=1e-30))
    e = torch.where(sound, (aa * by - ab * ay) / safe, 0.0)
    return d.clamp(min=0), e.clamp(min=0)


def _codes(
    x: torch.Tensor, d: torch.Tensor, e: torch.Tensor, scales: torch.Tensor, offsets: torch.Tensor
) -> torch.Tensor:
    """The nearest codes [blocks, 8, 32], float32."""
    step = (d[:, None] * scales)[..., None]
    moved = x + (e[:, None] * offsets)[..., None]
    return torch.where(step > 0, torch.round(moved / step.clamp(min=1e-30)), 0.0).clamp(0, 15)


def _error(
    x: torch.Tensor,
    weight: torch.Tensor,
    d: torch.Tensor,
    e: torch.Tensor,
    scales: torch.Tensor,
    offsets: torch.Tensor,
) -> torch.Tensor:
    codes = _codes(x, d, e, scales, offsets)
    near = (d[:, None] * scales)[..., None] * codes - (e[:, None] * offsets)[..., None]
    return _sum((weight * (near - x).square()).flatten(1))


def _part_error(
    x: torch.Tensor, weight: torch.Tensor, scale: torch.Tensor, offset: torch.Tensor
) -> torch.Tensor:
    s, m = scale[..., None].clamp(min=1e-30), offset[..., None]
    near = torch.round((x + m) / s).clamp(0, 15) * s - m
    return _sum(weight * (near - x).square())


def _six_bits(values: torch.Tensor, unit: torch.Tensor) -> torch.Tensor:
    whole = torch.round(values / unit.clamp(min=1e-30)[:, None]).clamp(0, 63)
    return torch.where(unit[:, None] > 0, whole, 0.0)


def _half(values: torch.Tensor) -> torch.Tensor:
    """As the file has it."""
    return values.clamp(max=65504.0).half().float()


def _scale_bytes(scales: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """12 bytes: 6 bits of the first four scales and offsets, and the rest in what is left."""
    s, m = scales.to(torch.uint8), offsets.to(torch.uint8)
    first, second = s[:, :4] | ((s[:, 4:] >> 4) << 6), m[:, :4] | ((m[:, 4:] >> 4) << 6)
    return torch.cat([first, second, (s[:, 4:] & 15) | ((m[:, 4:] & 15) << 4)], 1)


def _sum(x: torch.Tensor) -> torch.Tensor:
    return x.sum(-1)
