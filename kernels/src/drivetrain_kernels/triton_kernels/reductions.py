"""Norms and LAMB in Triton: sums in float64, in an order that does not depend on timing."""

from __future__ import annotations

import triton
import triton.language as tl

from drivetrain_kernels.triton_kernels.values import factor_of, rounded, widened

_SEEDS = ("low", "high")


@triton.jit
def norm_kernel(values, sums, count, block: tl.constexpr):
    """The sum of squares of every programs-th block of ``values``."""
    programs = tl.num_programs(0)
    total = tl.zeros((block,), tl.float64)
    for index in range(tl.program_id(0), tl.cdiv(count, block), programs):
        at = tl.cast(index, tl.int64) * block + tl.arange(0, block)
        value = widened(values, at, at < count).to(tl.float64)
        total += value * value
    tl.store(sums + tl.program_id(0), tl.sum(total))


@triton.jit
def _direction(m, v, w, eps, decay, inverse_first, inverse_second):  # fmt: skip
    denominator = tl.sqrt_rn(v) * inverse_second + eps
    return tl.div_rn(m * inverse_first, denominator) + w * decay


@triton.jit(do_not_specialize=_SEEDS)
def moments_kernel(
    weights, gradient, exp_avg, exp_avg_sq, scale_tensor, scale,
    low, high, chunks, norms, beta1, rest1, beta2, rest2,
    eps, decay, inverse_first, inverse_second,
    random: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Moments of one chunk, and the squares of its weights and of its update.

    The update is defined on the moments as stored.
    """
    chunk = tl.program_id(0)
    start = tl.load(chunks + 3 * chunk)
    end = start + tl.load(chunks + 3 * chunk + 1)
    factor = factor_of(scale, scale_tensor)
    weight_sum = tl.zeros((block,), tl.float64)
    update_sum = tl.zeros((block,), tl.float64)
    for first in range(start, end, block):
        at = first + tl.arange(0, block).to(tl.int64)
        inside = at < end
        w = widened(weights, at, inside)
        g = widened(gradient, at, inside) * factor
        m = widened(exp_avg, at, inside) * beta1 + g * rest1
        v = widened(exp_avg_sq, at, inside) * beta2 + (g * g) * rest2
        stored_m = rounded(m, at, low, high, exp_avg, 1, random)
        stored_v = rounded(v, at, low, high, exp_avg_sq, 2, random)
        tl.store(exp_avg + at, stored_m, mask=inside)
        tl.store(exp_avg_sq + at, stored_v, mask=inside)
        m = stored_m.to(tl.float32)
        v = stored_v.to(tl.float32)
        u = _direction(m, v, w, eps, decay, inverse_first, inverse_second)
        u = tl.where(inside, u, 0.0).to(tl.float64)
        wide = w.to(tl.float64)
        weight_sum += wide * wide
        update_sum += u * u
    tl.store(norms + 2 * chunk, tl.sum(weight_sum))
    tl.store(norms + 2 * chunk + 1, tl.sum(update_sum))


@triton.jit
def ratios_kernel(norms, first_chunks, ratios, low, high, block: tl.constexpr):  # fmt: skip
    """The trust ratio of one tensor, from the sums of its chunks."""
    tensor = tl.program_id(0)
    start = tl.load(first_chunks + tensor)
    end = tl.load(first_chunks + tensor + 1)
    weight_sum = tl.zeros((block,), tl.float64)
    update_sum = tl.zeros((block,), tl.float64)
    for first in range(start, end, block):
        at = first + tl.arange(0, block).to(tl.int64)
        weight_sum += tl.load(norms + 2 * at, mask=at < end, other=0.0)
        update_sum += tl.load(norms + 2 * at + 1, mask=at < end, other=0.0)
    weight = tl.sum(weight_sum)
    update = tl.sum(update_sum)
    known = (weight > 0) & (update > 0)
    ratio = tl.sqrt(weight) / tl.sqrt(tl.where(known, update, 1.0))
    ratio = tl.minimum(tl.maximum(ratio, low), high)
    tl.store(ratios + tensor, tl.where(known, ratio, 1.0).to(tl.float32))


@triton.jit(do_not_specialize=_SEEDS)
def step_kernel(
    weights, exp_avg, exp_avg_sq, out, low, high, chunks,
    ratios, lr, eps, decay, inverse_first, inverse_second,
    random: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """The step of one chunk."""
    chunk = tl.program_id(0)
    start = tl.load(chunks + 3 * chunk)
    end = start + tl.load(chunks + 3 * chunk + 1)
    step = tl.load(ratios + tl.load(chunks + 3 * chunk + 2)) * lr
    for first in range(start, end, block):
        at = first + tl.arange(0, block).to(tl.int64)
        inside = at < end
        w = widened(weights, at, inside)
        m = widened(exp_avg, at, inside)
        v = widened(exp_avg_sq, at, inside)
        w = w - _direction(m, v, w, eps, decay, inverse_first, inverse_second) * step
        tl.store(weights + at, rounded(w, at, low, high, weights, 0, random), mask=inside)
        if out is not None:
            tl.store(out + at, rounded(w, at, low, high, out, 0, random), mask=inside)
