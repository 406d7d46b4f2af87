"""Elementwise optimizer updates in Triton; the formulas are those of the references."""

from __future__ import annotations

import triton
import triton.language as tl

from drivetrain_kernels.triton_kernels.values import decayed, factor_of, rounded, widened

_SEEDS = ("low", "high")


@triton.jit
def _elements(count, block: tl.constexpr):
    """Indices of this program's elements, in 64 bits, and which of them there are."""
    at = tl.program_id(0).to(tl.int64) * block + tl.arange(0, block)
    return at, at < count


@triton.jit
def _store_weights(weights, out, values, at, inside, low, high, random: tl.constexpr):  # fmt: skip
    tl.store(weights + at, rounded(values, at, low, high, weights, 0, random), mask=inside)
    if out is not None:
        tl.store(out + at, rounded(values, at, low, high, out, 0, random), mask=inside)


@triton.jit(do_not_specialize=_SEEDS)
def adam_kernel(
    weights, gradient, exp_avg, exp_avg_sq, out, scale_tensor,
    count, scale, low, high,
    beta1, rest1, beta2, rest2, eps, coupled_decay, keep,
    inverse_second, step_size, random: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Adam and AdamW."""
    at, inside = _elements(count, block)
    w = widened(weights, at, inside)
    g = widened(gradient, at, inside) * factor_of(scale, scale_tensor)
    g = decayed(g, w, coupled_decay)
    m = widened(exp_avg, at, inside) * beta1 + g * rest1
    v = widened(exp_avg_sq, at, inside) * beta2 + (g * g) * rest2
    denominator = tl.sqrt_rn(v) * inverse_second + eps
    w = w * keep - tl.div_rn(m, denominator) * step_size
    tl.store(exp_avg + at, rounded(m, at, low, high, exp_avg, 1, random), mask=inside)
    tl.store(exp_avg_sq + at, rounded(v, at, low, high, exp_avg_sq, 2, random), mask=inside)
    _store_weights(weights, out, w, at, inside, low, high, random)


@triton.jit(do_not_specialize=_SEEDS)
def adagrad_kernel(
    weights, gradient, state_sum, out, scale_tensor,
    count, scale, low, high,
    lr, eps, decay, random: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Adagrad."""
    at, inside = _elements(count, block)
    w = widened(weights, at, inside)
    g = widened(gradient, at, inside) * factor_of(scale, scale_tensor)
    g = decayed(g, w, decay)
    total = widened(state_sum, at, inside) + g * g
    w = w - tl.div_rn(g, tl.sqrt_rn(total) + eps) * lr
    tl.store(state_sum + at, rounded(total, at, low, high, state_sum, 1, random), mask=inside)
    _store_weights(weights, out, w, at, inside, low, high, random)


@triton.jit(do_not_specialize=_SEEDS)
def lion_kernel(
    weights, gradient, exp_avg, out, scale_tensor,
    count, scale, low, high,
    lr, beta1, rest1, beta2, rest2, keep,
    random: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """Lion."""
    at, inside = _elements(count, block)
    w = widened(weights, at, inside)
    g = widened(gradient, at, inside) * factor_of(scale, scale_tensor)
    m = widened(exp_avg, at, inside)
    direction = m * beta1 + g * rest1
    m = m * beta2 + g * rest2
    # Not a number compares false twice: its sign is 0, as torch.sign's is.
    sign = tl.where(direction > 0, 1.0, 0.0) - tl.where(direction < 0, 1.0, 0.0)
    w = w * keep - sign * lr
    tl.store(exp_avg + at, rounded(m, at, low, high, exp_avg, 1, random), mask=inside)
    _store_weights(weights, out, w, at, inside, low, high, random)


@triton.jit(do_not_specialize=_SEEDS)
def sgd_kernel(
    weights, gradient, buffer, out, scale_tensor,
    count, scale, low, high,
    lr, momentum, rest, decay, nesterov: tl.constexpr, first: tl.constexpr,
    random: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """SGD, with momentum if there is a buffer."""
    at, inside = _elements(count, block)
    w = widened(weights, at, inside)
    g = widened(gradient, at, inside) * factor_of(scale, scale_tensor)
    g = decayed(g, w, decay)
    direction = g
    if buffer is not None:
        held = g
        if not first:
            held = widened(buffer, at, inside) * momentum + g * rest
        direction = g + held * momentum if nesterov else held
        tl.store(buffer + at, rounded(held, at, low, high, buffer, 1, random), mask=inside)
    _store_weights(weights, out, w - direction * lr, at, inside, low, high, random)


@triton.jit(do_not_specialize=_SEEDS)
def cast_kernel(
    target, source, scale_tensor, count, scale, low, high,
    scaled: tl.constexpr, random: tl.constexpr, block: tl.constexpr,
):  # fmt: skip
    """A copy that scales and casts."""
    at, inside = _elements(count, block)
    values = widened(source, at, inside)
    if scaled:
        values = values * factor_of(scale, scale_tensor)
    tl.store(target + at, rounded(values, at, low, high, target, 0, random), mask=inside)
