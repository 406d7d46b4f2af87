"""Fused LAMB over a flat buffer of whole tensors.

You et al., "Large batch optimization for deep learning", 2020, algorithm 2, with bias correction
and a clipped trust ratio.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch

from drivetrain_kernels.checks import Checker
from drivetrain_kernels.op import Example, Op, Refusal, Tolerance
from drivetrain_kernels.ops.adam import corrections
from drivetrain_kernels.ops.update import (
    LEADING,
    TRAILING,
    Scale,
    check_update,
    load,
    split_scale,
    store_update,
    update_examples,
    update_refusals,
)
from drivetrain_kernels.registry import registry
from drivetrain_kernels.rounding import store

_checker = Checker("lamb")


def lamb(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    bounds: Sequence[int],
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    trust_range: tuple[float, float] = (0.01, 10.0),
    bias_correction: bool = True,
    out: torch.Tensor | None = None,
    scale: Scale = 1.0,
    seed: int | None = None,
) -> torch.Tensor:
    """One LAMB step, in place.

    The update ``u = m / (sqrt(v) + eps) + weight_decay * w`` is computed from the moments as
    stored, so that the norm and the step agree when they are stored in low precision.

    Args:
        weights: flat [n]; float32, bfloat16 or float16, as are all tensors here.
        gradient: flat [n]; used as ``gradient * scale``.
        exp_avg: first moment [n], updated.
        exp_avg_sq: second moment [n], updated.
        bounds: ``[0, end of tensor 0, end of tensor 1, ..., n]``: each tensor has its own ratio.
        step: number of this step, from 1.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled.
        trust_range: bounds of the trust ratio ``|w| / |u|``; it is 1 where a norm is 0.
        bias_correction: whether moments are divided by ``1 - beta ** step``.
        out: copy of the new weights [n] to write as well.
        scale: number or 0-d tensor.
        seed: rounds stores to bfloat16 stochastically; use a new seed at each step.

    Returns:
        The trust ratios, float32 [len(bounds) - 1].

    Raises:
        ArgumentError: names the argument and what was expected.
    """
    scale_tensor, number = split_scale(scale)
    ratios: torch.Tensor = LAMB.call(
        weights, gradient, exp_avg, exp_avg_sq, out, scale_tensor, number, seed,
        lr, betas[0], betas[1], eps, weight_decay, trust_range[0], trust_range[1],
        bias_correction, step, list(bounds),
    )  # fmt: skip
    return ratios


def _reference(
    weights: torch.Tensor, gradient: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor,
    out: torch.Tensor | None, scale_tensor: torch.Tensor | None, scale: float, seed: int | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, low: float, high: float,
    bias_correction: bool, step: int, bounds: list[int],
) -> torch.Tensor:  # fmt: skip
    x = load(weights, gradient, (exp_avg, exp_avg_sq), scale_tensor, scale)
    compute = x.weights.dtype
    first, second = corrections(beta1, beta2, step, bias_correction)
    store(exp_avg, x.states[0] * beta1 + x.gradient * (1 - beta1), seed, 1)
    store(exp_avg_sq, x.states[1] * beta2 + (x.gradient * x.gradient) * (1 - beta2), seed, 2)
    denominator = exp_avg_sq.to(compute).sqrt() * (1 / second) + eps
    direction = (exp_avg.to(compute) * (1 / first)) / denominator + x.weights * weight_decay
    ratios = torch.ones(len(bounds) - 1, dtype=torch.float32, device=weights.device)
    factors = torch.ones_like(x.weights)
    for index, (start, end) in enumerate(pairwise(bounds)):
        weight_norm = x.weights[start:end].double().norm()
        update_norm = direction[start:end].double().norm()
        ratio = (weight_norm / update_norm).clamp(low, high)
        ratio = torch.where((weight_norm > 0) & (update_norm > 0), ratio, 1.0)
        ratios[index] = ratio
        factors[start:end] = ratio
    values = x.weights - direction * (factors * lr)
    store_update({}, {}, (weights, values), out, seed)
    return ratios


def _check(
    weights: torch.Tensor, gradient: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor,
    out: torch.Tensor | None, scale_tensor: torch.Tensor | None, scale: float, seed: int | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, low: float, high: float,
    bias_correction: bool, step: int, bounds: list[int],
) -> None:  # fmt: skip
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    check_update(_checker, weights, gradient, states, out, scale_tensor, seed)
    _checker.number(beta1, "beta1", low=0, high=1)
    _checker.number(beta2, "beta2", low=0, high=1)
    _checker.number(low, "low", low=0)
    _checker.number(high, "high", low=low)
    _checker.number(step, "step", low=1)
    ordered = all(a <= b for a, b in pairwise(bounds))
    if not bounds or bounds[0] != 0 or bounds[-1] != weights.numel() or not ordered:
        raise _checker.fail("bounds", f"is {bounds}", f"ascending from 0 to {weights.numel()}")


def _fake(weights: torch.Tensor, *rest: Any) -> torch.Tensor:
    return weights.new_empty(len(rest[-1]) - 1, dtype=torch.float32)


_HYPERS: list[tuple[Any, ...]] = [
    (1e-2, 0.9, 0.999, 1e-6, 0.0, 0.01, 10.0, True, 1),
    (1e-2, 0.9, 0.99, 1e-6, 0.1, 0.2, 0.9, True, 5),
    (1e-2, 0.9, 0.99, 1e-6, 0.1, 0.01, 10.0, False, 5),
]


_ROUNDED_MOMENTS = Tolerance(
    relative={torch.float32: 2e-2, torch.bfloat16: 2e-2, torch.float16: 2e-3},
    absolute={torch.float32: 1e-3, torch.bfloat16: 1e-3, torch.float16: 1e-3},
)


def _examples(device: torch.device) -> Iterator[Example]:
    for example in update_examples(device, ("normal", "positive"), _HYPERS):
        size = example.arguments[0].numel()
        bounds = [0, size // 3, size // 3, size - size // 4, size]
        # The step follows from the moments as stored, so rounding them moves it by a rounding of
        # the step (at most lr * largest ratio), which a reference without rounding cannot know.
        rounded = example.arguments[2].dtype != torch.float32
        tolerance = _ROUNDED_MOMENTS if rounded else None
        yield Example(example.label, (*example.arguments, bounds), tolerance)


def _refusals(device: torch.device) -> Iterator[Refusal]:
    yield from update_refusals(device, 2, (*_HYPERS[0], [0, 8]))
    ones = [torch.ones(4, device=device) for _ in range(4)]
    call = (*ones, None, None, 1.0, None, *_HYPERS[0])
    yield Refusal("bounds that do not end at n", (*call, [0, 3]), "bounds")


LAMB = registry.define(
    Op(
        "lamb",
        f"({LEADING}Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, {TRAILING}"
        "float lr, float beta1, float beta2, float eps, float weight_decay, float low, float high, "
        "bool bias_correction, int step, int[] bounds) -> Tensor",
        reference=_reference,
        check=_check,
        examples=_examples,
        refusals=_refusals,
        fake=_fake,
    )
)
