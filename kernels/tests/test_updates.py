"""Fused updates against torch's own optimizers, in float64 and over several steps."""

from __future__ import annotations

import pytest
import torch
from drivetrain_kernels import ArgumentError, adagrad, adam, lamb, lion, sgd

STEPS = 5


def gradients(count=37):
    generator = torch.Generator().manual_seed(1)
    return [torch.randn(count, generator=generator).double() for _ in range(STEPS)]


def torch_run(make, count=37):
    weights = torch.linspace(-1, 1, count, dtype=torch.float64).requires_grad_()
    optimizer = make([weights])
    for gradient in gradients(count):
        weights.grad = gradient.clone()
        optimizer.step()
    return weights.detach()


def own_run(step, states, count=37):
    weights = torch.linspace(-1, 1, count, dtype=torch.float64)
    state = [torch.zeros(count, dtype=torch.float64) for _ in range(states)]
    for number, gradient in enumerate(gradients(count), start=1):
        step(weights, gradient * 4, *state, number)
    return weights


@pytest.mark.parametrize("decoupled", [True, False])
def test_adam_is_torchs_adam_and_adamw(decoupled):
    make = torch.optim.AdamW if decoupled else torch.optim.Adam
    expected = torch_run(lambda p: make(p, lr=0.01, betas=(0.8, 0.95), eps=1e-6, weight_decay=0.1))

    def step(weights, gradient, m, v, number):
        adam(
            weights,
            gradient,
            m,
            v,
            step=number,
            lr=0.01,
            betas=(0.8, 0.95),
            eps=1e-6,
            weight_decay=0.1,
            decoupled=decoupled,
            scale=0.25,
        )

    torch.testing.assert_close(own_run(step, 2), expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(("dampening", "nesterov"), [(0.0, True), (0.5, False)])
def test_sgd_is_torchs_sgd(dampening, nesterov):
    kwargs = {"momentum": 0.9, "dampening": dampening, "weight_decay": 0.1, "nesterov": nesterov}
    expected = torch_run(lambda p: torch.optim.SGD(p, lr=0.05, **kwargs))

    def step(weights, gradient, buffer, number):
        scale = torch.tensor(0.25, dtype=torch.float64)
        sgd(weights, gradient, buffer, lr=0.05, first=number == 1, scale=scale, **kwargs)

    torch.testing.assert_close(own_run(step, 1), expected, rtol=1e-12, atol=1e-12)


def test_plain_sgd_needs_no_buffer():
    expected = torch_run(lambda p: torch.optim.SGD(p, lr=0.05))
    own = own_run(lambda w, g, number: sgd(w, g, lr=0.05, scale=0.25), 0)
    torch.testing.assert_close(own, expected, rtol=1e-12, atol=1e-12)


def test_adagrad_is_torchs_adagrad():
    expected = torch_run(lambda p: torch.optim.Adagrad(p, lr=0.05, weight_decay=0.1))

    def step(weights, gradient, total, number):
        adagrad(weights, gradient, total, lr=0.05, weight_decay=0.1, scale=0.25)

    torch.testing.assert_close(own_run(step, 1), expected, rtol=1e-12, atol=1e-12)


def test_lion_moves_by_the_sign_of_the_interpolated_momentum():
    weights = torch.tensor([1.0, 1.0, 1.0], dtype=torch.float64)
    momentum = torch.tensor([1.0, -1.0, 0.0], dtype=torch.float64)
    gradient = torch.tensor([-1.0, -1.0, 0.0], dtype=torch.float64)
    lion(weights, gradient, momentum, lr=0.1, betas=(0.9, 0.5), weight_decay=0.5)
    # keep = 1 - 0.1 * 0.5; signs of 0.9 m + 0.1 g = 0.8, -1.0, 0.0
    expected = torch.tensor([0.85, 1.05, 0.95], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-15, atol=1e-15)
    torch.testing.assert_close(momentum, torch.tensor([0.0, -1.0, 0.0], dtype=torch.float64))


def test_lamb_scales_each_tensors_step_by_its_own_trust_ratio():
    weights = torch.tensor([3.0, 4.0, 0.0, 0.0, 0.3], dtype=torch.float64)
    states = [torch.zeros(5, dtype=torch.float64) for _ in range(2)]
    gradient = torch.ones(5, dtype=torch.float64)
    ratios = lamb(
        weights, gradient, *states, bounds=[0, 2, 4, 5], step=1, lr=0.1, eps=0, trust_range=(0, 2)
    )
    # After one bias-corrected step the update is 1 everywhere: |w| / |u| = 5 / sqrt(2), clipped to
    # 2; a zero tensor keeps ratio 1; 0.3 / 1.
    torch.testing.assert_close(ratios, torch.tensor([2.0, 1.0, 0.3]))
    expected = torch.tensor([2.8, 3.8, -0.1, -0.1, 0.27], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=1e-6, atol=1e-7)


def test_low_precision_copy_is_the_rounded_new_weight():
    weights, gradient = torch.randn(100), torch.randn(100).bfloat16()
    out = torch.zeros(100, dtype=torch.bfloat16)
    adam(weights, gradient, torch.zeros(100), torch.zeros(100), step=1, lr=1e-2, out=out)
    assert torch.equal(out, weights.bfloat16())


def test_parameters_that_require_gradients_may_be_updated():
    weight = torch.nn.Parameter(torch.ones(4))
    before = weight._version
    sgd(weight, torch.ones(4), lr=0.5)
    assert torch.equal(weight.detach(), torch.full((4,), 0.5))
    assert weight._version > before


def test_aliasing_is_refused_by_name():
    weights = torch.ones(4)
    with pytest.raises(ArgumentError, match=r"drivetrain::sgd: weights shares memory with gradi"):
        sgd(weights, weights, lr=0.1)


def test_compiled_functions_may_call_the_ops():
    def step(weights, gradient):
        sgd(weights, gradient * 2, lr=0.5)
        return weights + 1

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    weights = torch.ones(3)
    assert torch.equal(compiled(weights, torch.ones(3)), torch.ones(3))
    assert torch.equal(weights, torch.zeros(3))
