"""Fused Adam and AdamW over flat buffers.

Kingma and Ba, "Adam: a method for stochastic optimization", 2015, algorithm 1; decoupled weight
decay by Loshchilov and Hutter, "Decoupled weight decay regularization", 2019, algorithm 2.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from drivetrain_kernels.checks import Checker
from drivetrain_kernels.op import Example, Op, Refusal
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

_checker = Checker("adam")


def adam(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    exp_avg_sq: torch.Tensor,
    *,
    step: int,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.999),
    eps: float = 1e-8,
    weight_decay: float = 0.0,
    decoupled: bool = True,
    bias_correction: bool = True,
    out: torch.Tensor | None = None,
    scale: Scale = 1.0,
    seed: int | None = None,
) -> None:
    """One Adam step, in place, in one pass over memory.

    Args:
        weights: flat [n]; float32, bfloat16 or float16, as are all tensors here.
        gradient: flat [n]; used as ``gradient * scale``.
        exp_avg: first moment [n], updated.
        exp_avg_sq: second moment [n], updated.
        step: number of this step, from 1.
        lr: learning rate.
        betas: decay rates of the two moments.
        eps: added to the root of the second moment.
        weight_decay: factor; decoupled (AdamW) or added to the gradient (Adam).
        decoupled: AdamW when true.
        bias_correction: whether moments are divided by ``1 - beta ** step``.
        out: copy of the new weights [n] to write as well.
        scale: number or 0-d tensor.
        seed: rounds stores to bfloat16 stochastically; use a new seed at each step.

    Raises:
        ArgumentError: names the argument and what was expected.
    """
    scale_tensor, number = split_scale(scale)
    ADAM.call(
        weights, gradient, exp_avg, exp_avg_sq, out, scale_tensor, number, seed,
        lr, betas[0], betas[1], eps, weight_decay, decoupled, bias_correction, step,
    )  # fmt: skip


def corrections(beta1: float, beta2: float, step: int, enabled: bool) -> tuple[float, float]:
    """``1 - beta1 ** step`` and the square root of ``1 - beta2 ** step``."""
    if not enabled:
        return 1.0, 1.0
    return 1 - beta1**step, float((1 - beta2**step) ** 0.5)


def _reference(
    weights: torch.Tensor, gradient: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor,
    out: torch.Tensor | None, scale_tensor: torch.Tensor | None, scale: float, seed: int | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool,
    bias_correction: bool, step: int,
) -> None:  # fmt: skip
    x = load(weights, gradient, (exp_avg, exp_avg_sq), scale_tensor, scale)
    values, grad = x.weights, x.gradient
    first, second = corrections(beta1, beta2, step, bias_correction)
    if weight_decay and not decoupled:
        grad = grad + values * weight_decay
    m = x.states[0] * beta1 + grad * (1 - beta1)
    v = x.states[1] * beta2 + (grad * grad) * (1 - beta2)
    denominator = v.sqrt() * (1 / second) + eps
    if weight_decay and decoupled:
        values = values * (1 - lr * weight_decay)
    values = values - (m / denominator) * (lr / first)
    targets = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    store_update(targets, {"exp_avg": m, "exp_avg_sq": v}, (weights, values), out, seed)


def _check(
    weights: torch.Tensor, gradient: torch.Tensor, exp_avg: torch.Tensor, exp_avg_sq: torch.Tensor,
    out: torch.Tensor | None, scale_tensor: torch.Tensor | None, scale: float, seed: int | None,
    lr: float, beta1: float, beta2: float, eps: float, weight_decay: float, decoupled: bool,
    bias_correction: bool, step: int,
) -> None:  # fmt: skip
    states = {"exp_avg": exp_avg, "exp_avg_sq": exp_avg_sq}
    check_update(_checker, weights, gradient, states, out, scale_tensor, seed)
    _checker.number(beta1, "beta1", low=0, high=1)
    _checker.number(beta2, "beta2", low=0, high=1)
    _checker.number(eps, "eps", low=0)
    _checker.number(step, "step", low=1)


_HYPERS: list[tuple[Any, ...]] = [
    (1e-3, 0.9, 0.999, 1e-8, 0.0, True, True, 1),
    (1e-2, 0.9, 0.95, 1e-6, 0.1, True, True, 7),
    (1e-2, 0.8, 0.99, 1e-8, 0.1, False, True, 3),
    (1e-3, 0.9, 0.999, 1e-8, 0.01, True, False, 100),
]


def _examples(device: torch.device) -> Iterator[Example]:
    return update_examples(device, ("normal", "positive"), _HYPERS)


def _refusals(device: torch.device) -> Iterator[Refusal]:
    return update_refusals(device, 2, _HYPERS[0])


ADAM = registry.define(
    Op(
        "adam",
        f"({LEADING}Tensor(b!) exp_avg, Tensor(c!) exp_avg_sq, {TRAILING}"
        "float lr, float beta1, float beta2, float eps, float weight_decay, bool decoupled, "
        "bool bias_correction, int step) -> ()",
        reference=_reference,
        check=_check,
        examples=_examples,
        refusals=_refusals,
    )
)
