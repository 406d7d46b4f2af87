"""Fused Adagrad over flat buffers.

Duchi, Hazan and Singer, "Adaptive subgradient methods", JMLR 2011, with a diagonal matrix.
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

_checker = Checker("adagrad")


def adagrad(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    state_sum: torch.Tensor,
    *,
    lr: float,
    eps: float = 1e-10,
    weight_decay: float = 0.0,
    out: torch.Tensor | None = None,
    scale: Scale = 1.0,
    seed: int | None = None,
) -> None:
    """One Adagrad step as ``torch.optim.Adagrad`` defines it, in place.

    Args:
        weights: flat [n]; float32, bfloat16 or float16, as are all tensors here.
        gradient: flat [n]; used as ``gradient * scale``.
        state_sum: sum of squared gradients [n], updated.
        lr: learning rate of this step, after any decay.
        eps: added to the root of the sum.
        weight_decay: added to the gradient.
        out: copy of the new weights [n] to write as well.
        scale: number or 0-d tensor.
        seed: rounds stores to bfloat16 stochastically; use a new seed at each step.

    Raises:
        ArgumentError: names the argument and what was expected.
    """
    scale_tensor, number = split_scale(scale)
    ADAGRAD.call(
        weights, gradient, state_sum, out, scale_tensor, number, seed, lr, eps, weight_decay
    )


def _reference(
    weights: torch.Tensor, gradient: torch.Tensor, state_sum: torch.Tensor,
    out: torch.Tensor | None, scale_tensor: torch.Tensor | None, scale: float, seed: int | None,
    lr: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    x = load(weights, gradient, (state_sum,), scale_tensor, scale)
    grad = x.gradient + x.weights * weight_decay if weight_decay else x.gradient
    total = x.states[0] + grad * grad
    values = x.weights - (grad / (total.sqrt() + eps)) * lr
    store_update({"sum": state_sum}, {"sum": total}, (weights, values), out, seed)


def _check(
    weights: torch.Tensor, gradient: torch.Tensor, state_sum: torch.Tensor,
    out: torch.Tensor | None, scale_tensor: torch.Tensor | None, scale: float, seed: int | None,
    lr: float, eps: float, weight_decay: float,
) -> None:  # fmt: skip
    check_update(_checker, weights, gradient, {"state_sum": state_sum}, out, scale_tensor, seed)
    _checker.number(eps, "eps", low=0)


_HYPERS: list[tuple[Any, ...]] = [(1e-2, 1e-10, 0.0), (1e-1, 1e-8, 0.1)]


def _examples(device: torch.device) -> Iterator[Example]:
    return update_examples(device, ("positive",), _HYPERS)


def _refusals(device: torch.device) -> Iterator[Refusal]:
    return update_refusals(device, 1, _HYPERS[0])


ADAGRAD = registry.define(
    Op(
        "adagrad",
        f"({LEADING}Tensor(b!) state_sum, {TRAILING}float lr, float eps, float weight_decay) -> ()",
        reference=_reference,
        check=_check,
        examples=_examples,
        refusals=_refusals,
    )
)
