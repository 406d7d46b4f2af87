"""Block quantisation in Triton; the arithmetic is ``block_format``'s.

A program holds ``rows`` blocks as a tile [rows, width]; ``width`` is the block size rounded up to a
power of two.
"""

from __future__ import annotations

import triton
import triton.language as tl

from drivetrain_kernels.triton_kernels.values import bits_of, float_of, widened

INT8 = tl.constexpr(0)
UINT8 = tl.constexpr(1)
INT4 = tl.constexpr(2)
UINT4 = tl.constexpr(3)
E4M3 = tl.constexpr(4)
E5M2 = tl.constexpr(5)


@triton.jit
def _round_fp8(values, mantissa: tl.constexpr, bias: tl.constexpr):
    """Codes of ``values``, which are at most the largest finite code's value."""
    drop: tl.constexpr = 23 - mantissa
    # Adding this puts the last place of subnormal codes into the last bit of the sum.
    aligned: tl.constexpr = (128 - bias + drop) << 23
    sign = (bits_of(values) >> 24) & 0x80
    bits = bits_of(values) & 0x7FFFFFFF
    shift = float_of(tl.full(values.shape, aligned, tl.uint32))
    subnormal = bits_of(float_of(bits) + shift) - aligned
    half: tl.constexpr = (1 << (drop - 1)) - 1
    normal = ((bits + half + ((bits >> drop) & 1)) >> drop) - ((127 - bias) << mantissa)
    return sign | tl.where(bits < ((128 - bias) << 23), subnormal, normal)


@triton.jit
def _widen_fp8(codes, mantissa: tl.constexpr, bias: tl.constexpr):
    """The exponent moves by a product, which makes subnormal codes normal floats, exactly."""
    sign = (codes & 0x80) << 24
    magnitude = codes & 0x7F
    moved = float_of(tl.full(codes.shape, (254 - bias) << 23, tl.uint32))
    finite = bits_of(float_of(magnitude << (23 - mantissa)) * moved)
    # e4m3 has one NaN and no infinities; e5m2 has both, as IEEE formats do.
    if mantissa == 3:
        bits = tl.where(magnitude == 0x7F, 0x7FC00000, finite)
    else:
        bits = tl.where(magnitude == 0x7C, 0x7F800000, finite)
        bits = tl.where(magnitude > 0x7C, 0x7FC00000, bits)
    return float_of(sign | bits.to(tl.uint32))


@triton.jit
def _largest(form: tl.constexpr):
    if form == 0:
        return 127.0
    if form == 1:
        return 255.0
    if form == 2:
        return 7.0
    if form == 3:
        return 15.0
    return 448.0 if form == 4 else 57344.0


@triton.jit
def _encode(steps, form: tl.constexpr):
    if form == E4M3:
        return _round_fp8(steps, 3, 7)
    if form == E5M2:
        return _round_fp8(steps, 2, 15)
    # Adding 1.5 * 2^23 rounds to the nearest integer, ties to even; the clamp matters for steps a
    # rounding error above the largest.
    whole = (steps + 12582912.0) - 12582912.0
    largest = _largest(form)
    least = 0.0 if form == UINT8 or form == UINT4 else -largest
    return tl.minimum(tl.maximum(whole, least), largest).to(tl.int32).to(tl.uint32)


@triton.jit
def _decode(codes, form: tl.constexpr):
    if form == E4M3:
        return _widen_fp8(codes, 3, 7)
    if form == E5M2:
        return _widen_fp8(codes, 2, 15)
    if form == INT8:
        return ((codes ^ 0x80).to(tl.int32) - 128).to(tl.float32)
    if form == INT4:
        return ((codes ^ 8).to(tl.int32) - 8).to(tl.float32)
    return codes.to(tl.float32)


@triton.jit
def _load_codes(codes, at, inside, form: tl.constexpr):
    if form == INT4 or form == UINT4:
        pairs = tl.load(codes + at // 2, mask=inside, other=0).to(tl.uint32)
        return (pairs >> (4 * (at % 2)).to(tl.uint32)) & 0xF
    return tl.load(codes + at, mask=inside, other=0).to(tl.uint32)


@triton.jit
def _tile(count, size, rows: tl.constexpr, width: tl.constexpr):
    """Blocks [rows, 1] of this program, their elements [rows, width], and which of them exist."""
    block = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    within = tl.arange(0, width)[None, :]
    at = block * size + within
    return block, at, (within < size) & (at < count)


@triton.jit
def _put(
    values, codes, parameters, count, size,
    form: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Quantise a tile of values, 0 where there are none, and store codes and parameters."""
    symmetric: tl.constexpr = form != UINT8 and form != UINT4
    block, at, inside = _tile(count, size, rows, width)
    # Ordered as integers, NaN lies above infinity, so nothing is lost in the maximum.
    magnitude = tl.max((bits_of(values) & 0x7FFFFFFF).to(tl.int32), 1)[:, None]
    if symmetric:
        low = tl.zeros((rows, 1), tl.float32)
        extent = magnitude.to(tl.float32, bitcast=True)
    else:
        low = tl.min(tl.where(inside, values, float("inf")), 1)[:, None]
        extent = tl.max(tl.where(inside, values, float("-inf")), 1)[:, None] - low
    finite = extent < float("inf")
    broken = (magnitude >= 0x7F800000) | (finite == 0)
    flat = extent < 7.888609052210118e-31  # 2^-100
    scale = tl.where(flat, 1.0, tl.div_rn(extent, tl.full((rows, 1), _largest(form), tl.float32)))
    inverse = tl.div_rn(tl.full((rows, 1), 1.0, tl.float32), scale)
    steps = tl.where(flat | broken, 0.0, (values - low) * inverse)
    own = parameters + block * (1 if symmetric else 2)
    exists = block * size < count
    tl.store(own, tl.where(broken, float("nan"), scale), mask=exists)
    if not symmetric:
        tl.store(own + 1, tl.where(broken, float("nan"), low), mask=exists)
    found = tl.where(inside, _encode(steps, form), 0)
    if form == INT4 or form == UINT4:
        even, odd = tl.split(tl.reshape(found & 0xF, (rows, width // 2, 2)))
        at, _ = tl.split(tl.reshape(at, (rows, width // 2, 2)))
        inside, _ = tl.split(tl.reshape(inside.to(tl.int32), (rows, width // 2, 2)))
        tl.store(codes + at // 2, (even | (odd << 4)).to(tl.uint8), mask=inside != 0)
    else:
        tl.store(codes + at, (found & 0xFF).to(tl.uint8), mask=inside)


@triton.jit
def quantize_kernel(
    values, codes, parameters, count, size,
    form: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Codes and parameters of ``rows`` blocks."""
    _, at, inside = _tile(count, size, rows, width)
    tile = widened(values, at, inside)
    _put(tile, codes, parameters, count, size, form, rows, width)


@triton.jit
def _dequantized(codes, parameters, at, inside, size, form: tl.constexpr):  # fmt: skip
    steps = _decode(_load_codes(codes, at, inside, form), form)
    block = at // size
    if form == UINT8 or form == UINT4:
        scale = tl.load(parameters + 2 * block, mask=inside, other=0.0)
        return steps * scale + tl.load(parameters + 2 * block + 1, mask=inside, other=0.0)
    return steps * tl.load(parameters + block, mask=inside, other=0.0)


@triton.jit
def dequantize_kernel(
    codes, parameters, values, count, size,
    form: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Values of ``block`` codes."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    inside = at < count
    found = _dequantized(codes, parameters, at, inside, size, form)
    tl.store(values + at, found.to(values.dtype.element_ty), mask=inside)


@triton.jit
def reduce_kernel(
    codes, parameters, sources, scale, sum_codes, sum_parameters,
    count, size, code_count, parameter_count,
    form: tl.constexpr, rows: tl.constexpr, width: tl.constexpr,
):  # fmt: skip
    """Codes and parameters of the scaled sum of contributions, added in order."""
    _, at, inside = _tile(count, size, rows, width)
    total = _dequantized(codes, parameters, at, inside, size, form)
    for source in range(1, sources):
        own = codes + tl.cast(source, tl.int64) * code_count
        of_source = parameters + tl.cast(source, tl.int64) * parameter_count
        total = total + _dequantized(own, of_source, at, inside, size, form)
    total = tl.where(inside, total * scale, 0.0)
    _put(total, sum_codes, sum_parameters, count, size, form, rows, width)
