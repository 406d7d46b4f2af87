"""One bit per element in Triton; the arithmetic is that of ``ops/signs.py``."""

from __future__ import annotations

import triton
import triton.language as tl


@triton.jit
def pack_signs_kernel(values, scale, error, packed, count, block: tl.constexpr):
    """``block`` bytes of signs, and what they leave out."""
    row = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    place = tl.arange(0, 8)
    at = row[:, None] * 8 + place[None, :]
    inside = at < count
    found = tl.load(values + at, mask=inside, other=-1.0)
    size = tl.load(scale)
    signs = found >= 0
    tl.store(error + at, found - tl.where(signs, size, -size), mask=inside)
    bits = tl.where(signs & inside, 1, 0) << place[None, :]
    tl.store(packed + row, tl.sum(bits, 1).to(tl.uint8), mask=row * 8 < count)


@triton.jit
def mean_signs_kernel(packed, scales, mean, sources, width, count, block: tl.constexpr):
    """The mean of ``block`` elements."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    total = tl.zeros((block,), tl.float32)
    for source in range(sources):
        own = packed + tl.cast(source, tl.int64) * width
        byte = tl.load(own + at // 8, mask=inside, other=0).to(tl.int32)
        scale = tl.load(scales + source)
        total = total + tl.where(((byte >> (at % 8).to(tl.int32)) & 1) != 0, scale, -scale)
    divisor = tl.cast(sources, tl.float32)
    tl.store(mean + at, tl.div_rn(total, tl.full((block,), 1.0, tl.float32) * divisor), mask=inside)
