"""Values in storage dtypes, as Triton functions: loads, roundings, random bits.

The arithmetic is that of ``drivetrain_kernels/rounding.py``. Divisions and roots are the correctly
rounded ones, so devices agree.
"""

from __future__ import annotations

import triton
import triton.language as tl

BLOCK = 4096 if triton.knobs.runtime.interpret else 1024
"""Elements of one program; the interpreter pays for each program, not for elements."""


@triton.jit
def widened(memory, at, inside):
    """Elements ``at`` as float32, 0 where not ``inside``."""
    return tl.load(memory + at, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def factor_of(scale, scale_tensor):
    """``scale`` times the number in device memory, if there is one."""
    if scale_tensor is not None:
        scale = scale * tl.load(scale_tensor)
    return scale


@triton.jit
def decayed(gradient, weights, decay):
    """L2 decay; without it an infinite weight must not turn the gradient into NaN."""
    return tl.where(decay != 0.0, gradient + weights * decay, gradient)


@triton.jit
def bits_of(values):
    """float32 as uint32."""
    return values.to(tl.uint32, bitcast=True)


@triton.jit
def float_of(bits):
    """uint32 as float32."""
    return bits.to(tl.uint32).to(tl.float32, bitcast=True)


@triton.jit
def rounded(values, at, low, high, target, stream: tl.constexpr, random: tl.constexpr):  # fmt: skip
    """``values`` in the dtype of pointer ``target``; bfloat16 stochastically if ``random``."""
    dtype: tl.constexpr = target.dtype.element_ty
    if random and dtype == tl.bfloat16:
        bits = bits_of(values)
        sums = bits + (random_words(at, low, high, stream) & 0xFFFF)
        finite = (bits & 0x7FFFFFFF) < 0x7F800000
        chosen = (sums >> 16).to(tl.uint16).to(tl.bfloat16, bitcast=True)
        return tl.where(finite, chosen, values.to(tl.bfloat16))
    return values.to(dtype)


@triton.jit
def random_words(at, low, high, stream: tl.constexpr):
    """Words whose low 16 bits are those of elements ``at``: Philox4x32-7, see ``rounding.py``."""
    counter = 16 * (at // 64) + at % 16
    a = (counter & 0xFFFFFFFF).to(tl.uint32)
    b = (counter >> 32).to(tl.uint32)
    c = tl.full(at.shape, stream // 2, tl.uint32)
    d = tl.zeros(at.shape, tl.uint32)
    key0 = low.to(tl.uint32, bitcast=True)
    key1 = high.to(tl.uint32, bitcast=True)
    first = tl.full(at.shape, 0xD2511F53, tl.uint32)
    second = tl.full(at.shape, 0xCD9E8D57, tl.uint32)
    for _ in tl.static_range(7):
        high_a = tl.umulhi(first, a)
        low_a = first * a
        high_c = tl.umulhi(second, c)
        low_c = second * c
        a = high_c ^ b ^ key0
        b = low_c
        c = high_a ^ d ^ key1
        d = low_a
        key0 = (key0 + 0x9E3779B9).to(tl.uint32)
        key1 = (key1 + 0xBB67AE85).to(tl.uint32)
    word = at % 64 // 16
    picked = tl.where(word < 2, tl.where(word == 0, a, b), tl.where(word == 2, c, d))
    return picked >> 16 if stream % 2 else picked
