"""LAMB against its formulas in float64, tensor by tensor."""

from __future__ import annotations

import pytest
import torch
from drivetrain_optimizers import Lamb

from drivetrain.testing.rules import place, read

SHAPES = {"a": (5, 7), "b": (3,), "c": ()}


def numbers(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }


def lamb(state, g, step, hyper):
    """You et al. 2020, Algorithm 2, with the trust ratio clipped."""
    p, m, v = state
    beta1, beta2 = hyper["betas"]
    m = beta1 * m + (1 - beta1) * g
    v = beta2 * v + (1 - beta2) * g * g
    mean, square = m, v
    if hyper["bias_correction"]:
        mean, square = m / (1 - beta1**step), v / (1 - beta2**step)
    if hyper["eps_inside_sqrt"]:
        u = mean / torch.sqrt(square + hyper["eps"])
    else:
        u = mean / (torch.sqrt(square) + hyper["eps"])
    u = u + hyper["weight_decay"] * p
    trust = 1.0
    if p.norm() > 0 and u.norm() > 0:
        trust = float(p.norm() / u.norm())
        trust = min(max(trust, hyper["min_coeff"]), hyper["max_coeff"])
    return p - hyper["lr"] * trust * u, m, v


@pytest.mark.parametrize("scale", [1.0, 0.25, torch.tensor(0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(
    "params",
    [
        {},
        {"bias_correction": True, "weight_decay": 0.1},
        {"eps_inside_sqrt": True, "eps": 1e-3, "betas": (0.5, 0.8)},
        {"max_coeff": 0.5},
        {"min_coeff": 3.0, "max_coeff": 20.0},
    ],
)
def test_ten_steps_equal_the_formulas(params, dtype, scale):
    rule = Lamb(lr=0.01, **params)
    start = numbers(0, dtype)
    home, flat, flatten = place(rule, start)
    states = {
        name: (value.double(), torch.zeros_like(value.double()), torch.zeros_like(value.double()))
        for name, value in start.items()
    }
    for step in range(10):
        gradients = numbers(step + 1, dtype)
        for name, gradient in gradients.items():
            scaled = gradient.double() * float(scale)
            states[name] = lamb(states[name], scaled, step + 1, rule.defaults)
        home.update(flatten(gradients), rule.defaults, scale)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-11
    for name, values in read(home, flat).items():
        torch.testing.assert_close(values.double(), states[name][0], rtol=tolerance, atol=1e-7)


def test_weights_of_zero_are_updated_without_trust():
    rule = Lamb(lr=0.1, betas=(0.0, 0.0), eps=0.0)
    home, flat, flatten = place(rule, {"a": torch.zeros(4)})
    home.update(flatten({"a": torch.tensor([1.0, -2.0, 3.0, -4.0])}), rule.defaults, 1.0)
    torch.testing.assert_close(flat[:4], torch.tensor([-0.1, 0.1, -0.1, 0.1]))


def test_an_update_of_zero_changes_nothing():
    rule = Lamb(lr=0.1)
    home, flat, flatten = place(rule, {"a": torch.ones(4)})
    home.update(flatten({"a": torch.zeros(4)}), rule.defaults, 1.0)
    assert torch.equal(flat[:4], torch.ones(4))


def test_every_tensor_has_its_own_trust_ratio():
    rule = Lamb(lr=0.1, betas=(0.0, 0.0))
    tensors = {"small": torch.full((4,), 0.5), "large": torch.full((4,), 5.0)}
    home, flat, flatten = place(rule, tensors)
    home.update(flatten({name: torch.ones(4) for name in tensors}), rule.defaults, 1.0)
    torch.testing.assert_close(flat[:4], torch.full((4,), 0.45))
    torch.testing.assert_close(flat[4:8], torch.full((4,), 4.5))
    assert rule.grain == "tensor"


def test_low_precision_parameters_are_rounded_masters():
    rule = Lamb(lr=0.01)
    home, flat, flatten = place(rule, numbers(0, torch.float32), parameter_dtype=torch.bfloat16)
    home.update(flatten(numbers(1, torch.float32)), rule.defaults, 1.0)
    assert torch.equal(flat, home.states.tensors["master"].bfloat16())


def test_limits_that_cross_are_refused():
    with pytest.raises(ValueError, match=r"max_coeff 0.1 is below min_coeff 0.5"):
        Lamb(min_coeff=0.5, max_coeff=0.1)
