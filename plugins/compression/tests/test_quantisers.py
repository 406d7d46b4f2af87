"""Every number format against formulas in float64, one number at a time, and its gradients."""

from __future__ import annotations

import math
from fractions import Fraction
from itertools import pairwise
from typing import Any

import pytest
import torch
from drivetrain_compression.quantisers import floating, integer
from drivetrain_compression.quantisers.grouping import in_blocks, in_groups
from drivetrain_compression.quantisers.straight_through import straight_through
from drivetrain_compression.training.activations import (
    ActivationQuantisationConfig,
    ActivationStep,
)

from drivetrain.errors import ConfigError


def half_even(value: float) -> int:
    return round(Fraction(value))  # exact, ties to even


def weights(groups: int = 5, size: int = 24) -> torch.Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.randn(groups, size, generator=generator, dtype=torch.float64)


def symmetric(group: list[float], bits: int) -> list[float]:
    scale = 2 * max(abs(w) for w in group) / 2**bits
    if scale == 0:
        return [0.0 for _ in group]
    half = 2 ** (bits - 1)
    return [scale * min(max(half_even(w / scale), -half), half - 1) for w in group]


def asymmetric(group: list[float], bits: int) -> list[float]:
    low, high = min(group), max(group)
    scale = (high - low) / 2**bits
    if scale == 0:
        return list(group)
    zero = half_even(low / scale) * scale
    top = 2**bits - 1
    return [scale * min(max(half_even((w - zero) / scale), 0), top) + zero for w in group]


def ternary(group: list[float]) -> list[float]:
    limit = 0.7 * math.fsum(abs(w) for w in group) / len(group)
    kept = [abs(w) for w in group if abs(w) > limit]
    alpha = math.fsum(kept) / len(kept) if kept else 0.0
    return [math.copysign(alpha, w) if abs(w) > limit else 0.0 for w in group]


def binary(group: list[float]) -> list[float]:
    mean = math.fsum(abs(w) for w in group) / len(group)
    return [math.copysign(mean, w) if w else 0.0 for w in group]


@pytest.mark.parametrize("bits", range(2, 17))
@pytest.mark.parametrize("name", ["symmetric", "asymmetric"])
def test_integers_are_the_formulas_bit_for_bit(name: str, bits: int) -> None:
    values = weights()
    values[3] = 0.0
    values[4] = 0.25
    found = getattr(integer, name)(values, bits)
    expected = [globals()[name](row, bits) for row in values.tolist()]
    assert found.tolist() == expected


VIEWS = {
    "one token of each row": lambda x: x[:, 0],
    "some features": lambda x: x[..., :5],
    "transposed": lambda x: x[0].t(),
    "a chunk": lambda x: x.chunk(2, dim=-1)[1],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS)
@pytest.mark.parametrize("kind", ["symmetric", "asymmetric"])
def test_views_are_rounded_as_copies_of_them_are(kind: str, view: Any) -> None:
    values = view(weights(4, 24).view(4, 2, 12))
    assert not values.is_contiguous()
    config = ActivationQuantisationConfig(bits=4, quantization_type=kind)
    step, layer = ActivationStep("", config), torch.nn.Linear(1, 1)
    assert torch.equal(step.inputs(layer, values), step.inputs(layer, values.contiguous()))
    rows = values.flatten(0, -2) if values.dim() > 2 else values
    wanted = [globals()[kind](row, 4) for row in rows.tolist()]
    assert getattr(integer, kind)(in_groups(rows, 0), 4).tolist() == wanted


@pytest.mark.parametrize("name", ["ternary", "binary"])
def test_one_and_two_bits_are_the_formulas(name: str) -> None:
    values = weights()
    values[3] = 0.0
    values[2, ::2] = 0.0
    found = getattr(integer, name)(values)
    expected = torch.tensor([globals()[name](row) for row in values.tolist()], dtype=torch.float64)
    torch.testing.assert_close(found, expected, rtol=1e-15, atol=0)
    assert (found == 0).equal(expected == 0)


def test_known_ranges_take_the_place_of_those_of_the_values() -> None:
    values, low, high = weights(), torch.tensor(-1.5).double(), torch.tensor(0.5).double()
    scale = 2 * 1.5 / 2**4
    expected = [[scale * min(max(half_even(w / scale), -8), 7) for w in r] for r in values.tolist()]
    assert integer.symmetric_static(values, low, high, 4).tolist() == expected
    step = 2.0 / 2**4
    zero = half_even(-1.5 / step) * step
    rows = values.tolist()
    expected = [
        [step * min(max(half_even((w - zero) / step), 0), 15) + zero for w in r] for r in rows
    ]
    assert integer.asymmetric_static(values, low, high, 4).tolist() == expected


@pytest.mark.parametrize("quantise", [integer.symmetric, integer.asymmetric])
def test_stochastic_rounding_is_right_on_average_and_never_off_by_a_step(quantise: object) -> None:
    values = weights(1, 400).expand(3000, -1).contiguous()
    generator = torch.Generator().manual_seed(1)

    def noise(like: torch.Tensor) -> torch.Tensor:
        return torch.rand(like.shape, generator=generator, dtype=like.dtype) - 0.5

    found = quantise(values, 5, noise)  # type: ignore[operator]
    step = (values.max() - values.min()) / 2**5 if quantise is integer.asymmetric else None
    scale = float(integer.symmetric_scale(values[:1], 5) if step is None else step)
    inside = (values[0] > values[0].min() + 2 * scale) & (values[0] < values[0].max() - 2 * scale)
    assert ((found - values).abs() <= scale * (1 + 1e-9))[:, inside].all()
    assert (found.mean(0) - values[0]).abs()[inside].max() < 4 * scale * 0.5 / math.sqrt(3000)
    assert not torch.equal(found[0], found[1])


def grid(format: floating.FloatFormat) -> list[Fraction]:
    """All numbers of a format that are not negative, by its definition."""
    bias, one = 2 ** (format.exponent - 1) - 1, 2**format.mantissa
    numbers = {Fraction(m, one) * Fraction(2) ** (1 - bias) for m in range(one)}
    for stored in range(1, 2**format.exponent):
        numbers |= {(1 + Fraction(m, one)) * Fraction(2) ** (stored - bias) for m in range(one)}
    return sorted(n for n in numbers if n <= Fraction(format.largest))


def nearest(value: float, numbers: list[Fraction], even: bool = True) -> float:
    """Of two that are as near, the one with an even code; without mantissas the larger."""
    size = Fraction(abs(value))
    tie = (lambda i: i % 2) if even else (lambda i: -i if i > 1 else i)
    ranked = sorted(range(len(numbers)), key=lambda i: (abs(numbers[i] - size), tie(i)))
    return math.copysign(float(numbers[ranked[0]]), value)


@pytest.mark.parametrize("format", floating.FORMATS.values(), ids=lambda f: f.name)
def test_small_floats_are_the_nearest_numbers_of_the_format(format: floating.FloatFormat) -> None:
    numbers = grid(format)
    middles = [float((a + b) / 2) for a, b in pairwise(numbers)]
    spread = (torch.rand(200, dtype=torch.float64) * 1.1 * format.largest).tolist()
    small = (torch.rand(200, dtype=torch.float64) * 2.0 ** (2 - format.bias)).tolist()
    # What is larger than all numbers is as near to the largest as can be.
    values = [*map(float, numbers), *middles, *spread, *small]
    values += [-value for value in values]
    even = format.mantissa > 0
    expected = [nearest(value, numbers, even) for value in values]
    assert format.round(torch.tensor(values, dtype=torch.float64)).tolist() == expected
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        exact = torch.tensor(values).to(dtype)
        held = [nearest(value, numbers, even) for value in exact.double().tolist()]
        assert format.round(exact).double().tolist() == held


@pytest.mark.parametrize("format", floating.FORMATS.values(), ids=lambda f: f.name)
def test_bit_patterns_of_small_floats_go_there_and_back(format: floating.FloatFormat) -> None:
    numbers = torch.tensor([float(n) for n in grid(format)])
    both = torch.cat([numbers, -numbers])
    codes = format.encode(both)
    assert len(set(codes.tolist())) == len(codes)
    assert int(codes.max()) < 2**format.bits
    assert torch.equal(format.decode(codes), both)
    assert codes[: len(numbers)].tolist() == list(range(len(numbers)))
    if format.name in ("e4m3", "e5m2"):
        torch_type = torch.float8_e4m3fn if format.name == "e4m3" else torch.float8_e5m2
        assert torch.equal(both.to(torch_type).view(torch.uint8), codes)


def test_scales_of_small_floats_reach_the_largest_and_may_be_powers_of_two() -> None:
    values = weights()
    values[3] = 0.0
    scale = floating.float_scale(values, floating.E2M1)
    expected = [[max(map(abs, row)) / 6.0 or 1.0] for row in values.tolist()]
    assert scale.tolist() == expected
    found = floating.floating(values, floating.E2M1)
    numbers = grid(floating.E2M1)
    for row, (s,), out in zip(values.tolist(), expected, found.tolist(), strict=True):
        assert out == [nearest(w / s, numbers) * s for w in row]
    powers = [[2.0 ** math.ceil(math.log2(s))] for (s,) in expected]
    assert floating.power_of_two(scale).tolist() == powers
    top = max(s for (s,) in expected)
    ratios = [[top / 2.0 ** math.ceil(math.log2(top / s))] for (s,) in expected]
    assert floating.power_of_two_ratios(scale).tolist() == ratios


def test_a_quantiser_passes_gradients_as_if_it_were_not_there() -> None:
    values = weights().requires_grad_()
    factor = weights() + 2
    out = straight_through(values, integer.symmetric(values.detach(), 4))
    assert torch.equal(out, integer.symmetric(values.detach(), 4))
    (factor * out**2).sum().backward()
    assert values.grad is not None
    torch.testing.assert_close(values.grad, 2 * factor * out.detach(), rtol=0, atol=0)


def test_groups_that_do_not_divide_are_refused_and_said_to_be_not_padded() -> None:
    weight = torch.zeros(6, 10)
    assert in_groups(weight, 4).shape == (4, 15)
    assert in_groups(weight, 0).shape == (6, 10)
    assert in_blocks(weight, 5).shape == (6, 2, 5)
    with pytest.raises(ConfigError, match=r"fc: 60 numbers \[6, 10\] .* 7 equal .*none is padded"):
        in_groups(weight, 7, "fc")
    with pytest.raises(ConfigError, match=r"fc: rows of 10 .* groups of 4.*none is padded"):
        in_blocks(weight, 4, "fc")
    with pytest.raises(ConfigError, match="fc: 17 bits; there are formats of 1 to 16"):
        integer.check_bits(17, "fc")
