"""Lion against its formulas in float64."""

from __future__ import annotations

import pytest
import torch
from drivetrain_optimizers import Lion

from drivetrain.testing.rules import place, read

SHAPES = {"a": (5, 7), "b": (3,), "c": ()}


def numbers(seed, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {
        name: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)
        for name, shape in SHAPES.items()
    }


def lion(p, m, g, *, lr, betas, weight_decay):
    """Chen et al. 2023, Program 1."""
    update = torch.sign(betas[0] * m + (1 - betas[0]) * g)
    p = p * (1 - lr * weight_decay) - lr * update
    return p, betas[1] * m + (1 - betas[1]) * g


@pytest.mark.parametrize("scale", [1.0, 0.25, torch.tensor(0.5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_ten_steps_equal_the_formulas(dtype, scale):
    hyper = {"lr": 0.01, "betas": (0.7, 0.9), "weight_decay": 0.1}
    start = numbers(0, dtype)
    rule = Lion(**hyper)
    home, flat, flatten = place(rule, start)
    weights = {name: value.double() for name, value in start.items()}
    momenta = {name: torch.zeros_like(value) for name, value in weights.items()}
    for step in range(10):
        gradients = numbers(step + 1, dtype)
        for name, gradient in gradients.items():
            weights[name], momenta[name] = lion(
                weights[name], momenta[name], gradient.double() * float(scale), **hyper
            )
        home.update(flatten(gradients), rule.defaults, scale)
    tolerance = 1e-5 if dtype == torch.float32 else 1e-12
    for name, values in read(home, flat).items():
        torch.testing.assert_close(values.double(), weights[name], rtol=tolerance, atol=1e-7)


def test_a_gradient_of_zero_decays_only():
    rule = Lion(lr=0.5, weight_decay=0.5)
    home, flat, flatten = place(rule, {"a": torch.ones(4)})
    home.update(flatten({"a": torch.zeros(4)}), rule.defaults, 1.0)
    assert torch.equal(flat[:4], torch.full((4,), 0.75))


def test_low_precision_parameters_are_rounded_masters():
    rule = Lion(lr=1e-3)
    start = numbers(0, torch.float32)
    home, flat, flatten = place(
        rule, start, parameter_dtype=torch.bfloat16, gradient_dtype=torch.bfloat16
    )
    expected = {name: value.double() for name, value in start.items()}
    momenta = {name: torch.zeros_like(value) for name, value in expected.items()}
    for step in range(5):
        gradients = numbers(step + 1, torch.bfloat16)
        for name, gradient in gradients.items():
            expected[name], momenta[name] = lion(
                expected[name],
                momenta[name],
                gradient.double(),
                lr=1e-3,
                betas=(0.9, 0.999),
                weight_decay=0.0,
            )
        home.update(flatten(gradients), rule.defaults, 1.0)
    for name, values in read(home, flat).items():
        assert torch.equal(values, expected[name].float().bfloat16())


@pytest.mark.parametrize(
    ("params", "message"),
    [
        ({"lr": -1}, "lr must be at least 0, got -1"),
        ({"weight_decay": float("nan")}, "weight_decay must be at least 0, got nan"),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers in \[0, 1\), got \[0.9, 1.0\]"),
        ({"betas": (0.9,)}, "betas must be two numbers"),
    ],
)
def test_values_out_of_range_are_refused(params, message):
    with pytest.raises(ValueError, match=message):
        Lion(**params)
