"""Fused SGD with momentum, and Lion, over flat buffers.

Lion: Chen et al., "Symbolic discovery of optimization algorithms", 2023, algorithm 2.
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

_sgd_checker = Checker("sgd")
_lion_checker = Checker("lion")


def sgd(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    momentum_buffer: torch.Tensor | None = None,
    *,
    lr: float,
    momentum: float = 0.0,
    dampening: float = 0.0,
    weight_decay: float = 0.0,
    nesterov: bool = False,
    first: bool = False,
    out: torch.Tensor | None = None,
    scale: Scale = 1.0,
    seed: int | None = None,
) -> None:
    """One SGD step as ``torch.optim.SGD`` defines it, in place.

    Args:
        weights: flat [n]; float32, bfloat16 or float16, as are all tensors here.
        gradient: flat [n]; used as ``gradient * scale``.
        momentum_buffer: [n], updated; needed when ``momentum`` is not 0.
        lr: learning rate.
        momentum: decay rate of the buffer.
        dampening: the buffer takes ``1 - dampening`` of the gradient.
        weight_decay: added to the gradient.
        nesterov: look ahead along the new buffer.
        first: whether this is the buffer's first step, which takes the gradient undamped.
        out: copy of the new weights [n] to write as well.
        scale: number or 0-d tensor.
        seed: rounds stores to bfloat16 stochastically; use a new seed at each step.

    Raises:
        ArgumentError: names the argument and what was expected.
    """
    scale_tensor, number = split_scale(scale)
    SGD.call(
        weights, gradient, momentum_buffer, out, scale_tensor, number, seed,
        lr, momentum, dampening, weight_decay, nesterov, first,
    )  # fmt: skip


def lion(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    exp_avg: torch.Tensor,
    *,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.99),
    weight_decay: float = 0.0,
    out: torch.Tensor | None = None,
    scale: Scale = 1.0,
    seed: int | None = None,
) -> None:
    """One Lion step, in place; where the interpolated momentum is exactly 0 the sign is 0.

    Args:
        weights: flat [n]; float32, bfloat16 or float16, as are all tensors here.
        gradient: flat [n]; used as ``gradient * scale``.
        exp_avg: momentum [n], updated.
        lr: learning rate.
        betas: interpolation rate of the update, decay rate of the momentum.
        weight_decay: decoupled.
        out: copy of the new weights [n] to write as well.
        scale: number or 0-d tensor.
        seed: rounds stores to bfloat16 stochastically; use a new seed at each step.

    Raises:
        ArgumentError: names the argument and what was expected.
    """
    scale_tensor, number = split_scale(scale)
    LION.call(
        weights, gradient, exp_avg, out, scale_tensor, number, seed,
        lr, betas[0], betas[1], weight_decay,
    )  # fmt: skip


def _sgd_reference(
    weights: torch.Tensor, gradient: torch.Tensor, momentum_buffer: torch.Tensor | None,
    out: torch.Tensor | None, scale_tensor: torch.Tensor | None, scale: float, seed: int | None,
    lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool, first: bool,
) -> None:  # fmt: skip
    buffers = () if momentum_buffer is None else (momentum_buffer,)
    x = load(weights, gradient, buffers, scale_tensor, scale)
    grad = x.gradient
    if weight_decay:
        grad = grad + x.weights * weight_decay
    if momentum_buffer is None:
        store_update({}, {}, (weights, x.weights - grad * lr), out, seed)
        return
    buffer = grad if first else x.states[0] * momentum + grad * (1 - dampening)
    direction = grad + buffer * momentum if nesterov else buffer
    targets, values = {"buffer": momentum_buffer}, {"buffer": buffer}
    store_update(targets, values, (weights, x.weights - direction * lr), out, seed)


def _lion_reference(
    weights: torch.Tensor, gradient: torch.Tensor, exp_avg: torch.Tensor,
    out: torch.Tensor | None, scale_tensor: torch.Tensor | None, scale: float, seed: int | None,
    lr: float, beta1: float, beta2: float, weight_decay: float,
) -> None:  # fmt: skip
    x = load(weights, gradient, (exp_avg,), scale_tensor, scale)
    direction = torch.sign(x.states[0] * beta1 + x.gradient * (1 - beta1))
    m = x.states[0] * beta2 + x.gradient * (1 - beta2)
    values = x.weights * (1 - lr * weight_decay) - direction * lr
    store_update({"exp_avg": exp_avg}, {"exp_avg": m}, (weights, values), out, seed)


def _sgd_check(
    weights: torch.Tensor, gradient: torch.Tensor, momentum_buffer: torch.Tensor | None,
    out: torch.Tensor | None, scale_tensor: torch.Tensor | None, scale: float, seed: int | None,
    lr: float, momentum: float, dampening: float, weight_decay: float, nesterov: bool, first: bool,
) -> None:  # fmt: skip
    if momentum and momentum_buffer is None:
        expected = f"a buffer, as momentum is {momentum}"
        raise _sgd_checker.fail("momentum_buffer", "is None", expected)
    states = {} if momentum_buffer is None else {"momentum_buffer": momentum_buffer}
    check_update(_sgd_checker, weights, gradient, states, out, scale_tensor, seed)
    if nesterov and (momentum <= 0 or dampening != 0):
        raise _sgd_checker.fail("nesterov", "is set", "momentum > 0 and dampening 0 with it")


def _lion_check(
    weights: torch.Tensor, gradient: torch.Tensor, exp_avg: torch.Tensor,
    out: torch.Tensor | None, scale_tensor: torch.Tensor | None, scale: float, seed: int | None,
    lr: float, beta1: float, beta2: float, weight_decay: float,
) -> None:  # fmt: skip
    states = {"exp_avg": exp_avg}
    check_update(_lion_checker, weights, gradient, states, out, scale_tensor, seed)
    _lion_checker.number(beta1, "beta1", low=0, high=1)
    _lion_checker.number(beta2, "beta2", low=0, high=1)


_SGD_HYPERS: list[tuple[Any, ...]] = [
    (1e-2, 0.9, 0.0, 0.0, False, False),
    (1e-2, 0.9, 0.0, 0.1, True, False),
    (1e-2, 0.8, 0.5, 0.0, False, False),
    (1e-2, 0.9, 0.5, 0.1, False, True),
]
_LION_HYPERS: list[tuple[Any, ...]] = [(1e-3, 0.9, 0.99, 0.0), (1e-2, 0.95, 0.98, 0.1)]


def _sgd_examples(device: torch.device) -> Iterator[Example]:
    yield from update_examples(device, ("normal",), _SGD_HYPERS)
    for example in update_examples(device, (), [(1e-2, 0.0, 0.0, 0.1, False, False)]):
        weights, gradient, *rest = example.arguments
        yield Example(f"plain-{example.label}", (weights, gradient, None, *rest))


def _lion_examples(device: torch.device) -> Iterator[Example]:
    yield from update_examples(device, ("normal",), _LION_HYPERS)
    zeros = torch.zeros(9, device=device)
    arguments = (torch.ones(9, device=device), zeros, zeros.clone(), None, None, 1.0, None)
    yield Example("zero momentum moves nothing", (*arguments, *_LION_HYPERS[0]))


def _sgd_refusals(device: torch.device) -> Iterator[Refusal]:
    yield from update_refusals(device, 1, _SGD_HYPERS[0])
    ones = torch.ones(4, device=device)
    missing = (ones, ones.clone(), None, None, None, 1.0, None, *_SGD_HYPERS[0])
    yield Refusal("momentum without a buffer", missing, "momentum_buffer")


def _lion_refusals(device: torch.device) -> Iterator[Refusal]:
    return update_refusals(device, 1, _LION_HYPERS[0])


SGD = registry.define(
    Op(
        "sgd",
        f"({LEADING}Tensor(b!)? momentum_buffer, {TRAILING}float lr, float momentum, "
        "float dampening, float weight_decay, bool nesterov, bool first) -> ()",
        reference=_sgd_reference,
        check=_sgd_check,
        examples=_sgd_examples,
        refusals=_sgd_refusals,
    )
)
LION = registry.define(
    Op(
        "lion",
        f"({LEADING}Tensor(b!) exp_avg, {TRAILING}"
        "float lr, float beta1, float beta2, float weight_decay) -> ()",
        reference=_lion_reference,
        check=_lion_check,
        examples=_lion_examples,
        refusals=_lion_refusals,
    )
)
