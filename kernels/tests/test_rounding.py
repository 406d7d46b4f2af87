"""Stochastic rounding: the generator's published vectors, its expectation, its edge cases."""

from __future__ import annotations

import torch
from drivetrain_kernels import cast_copy
from drivetrain_kernels.rounding import philox, random_bits, stochastic_bfloat16


def test_philox_gives_the_known_answers_of_random123():
    # Random123's kat_vectors, philox4x32 with 7 rounds.
    words = philox(torch.zeros(1, dtype=torch.int64), 0, 0)
    expected = [0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48]
    assert [int(word) for word in words] == expected


def test_rounding_is_right_in_expectation():
    # 1 + 2**-7 * 0.25 lies a quarter of the way between two bfloat16 values.
    values = torch.full((200_000,), 1 + 2.0**-9)
    rounded = stochastic_bfloat16(values, seed=3)
    assert set(rounded.unique().tolist()) == {1.0, 1 + 2.0**-7}
    share = float((rounded > 1).double().mean())
    assert abs(share - 0.25) < 5 * (0.25 * 0.75 / 200_000) ** 0.5


def test_representable_values_stay():
    values = torch.randn(5000).bfloat16().float()
    assert torch.equal(stochastic_bfloat16(values, seed=1).float(), values)


def test_infinities_and_nan_stay():
    values = torch.tensor([float("inf"), -float("inf"), float("nan")])
    rounded = stochastic_bfloat16(values, seed=1)
    assert rounded[0] == float("inf")
    assert rounded[1] == -float("inf")
    assert rounded[2].isnan()


def test_streams_and_seeds_are_independent():
    device = torch.device("cpu")
    draws = [random_bits(4096, seed, stream, device) for seed in (1, 2) for stream in range(4)]
    table = torch.stack(draws).double()
    correlation = torch.corrcoef(table) - torch.eye(len(draws), dtype=torch.float64)
    assert float(correlation.abs().max()) < 0.08


def test_an_element_does_not_depend_on_the_length():
    device = torch.device("cpu")
    long, short = random_bits(1000, 9, 1, device), random_bits(77, 9, 1, device)
    assert torch.equal(long[:77], short)


def test_cast_copy_rounds_by_its_seed():
    values = torch.randn(999)
    target = torch.empty(999, dtype=torch.bfloat16)
    cast_copy(target, values, seed=5)
    assert torch.equal(target, stochastic_bfloat16(values, 5))
    assert not torch.equal(target, values.bfloat16())
