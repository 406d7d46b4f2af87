"""Packed signs: the bits of a plain loop, with kernels and without."""

from __future__ import annotations

import pytest
import torch
from drivetrain_onebit import signs

VALUES = [0.0, -0.0, 1.5, -1e-40, 3e38, -2.0, 1e-40, -7.0, 0.1, -0.1, 2.0]


@pytest.mark.parametrize("pack", [signs.pack_signs, signs.pack_in_torch])
@pytest.mark.parametrize("numel", [0, 1, 8, 11])
def test_signs_are_packed_least_bit_first_and_leave_an_error(pack, numel: int) -> None:
    values = torch.tensor(VALUES[:numel])
    error = torch.empty(numel)
    packed = pack(values, torch.tensor([0.75]), error)
    expected = [0] * -(-numel // 8)
    for place, value in enumerate(VALUES[:numel]):
        expected[place // 8] |= (value >= 0) << place % 8
    assert packed.tolist() == expected
    sent = torch.tensor([0.75 if value >= 0 else -0.75 for value in VALUES[:numel]])
    assert torch.equal(error, values - sent)


@pytest.mark.parametrize("mean", [signs.mean_signs, signs.mean_in_torch])
def test_a_mean_is_that_of_scaled_signs(mean) -> None:
    packed = torch.tensor([[0b10110001, 1], [0b00001111, 2], [255, 3]], dtype=torch.uint8)
    scales = torch.tensor([0.5, 0.25, 2.0])
    bits = torch.tensor([[byte >> i & 1 for byte in row for i in range(8)] for row in packed])
    expected = ((2.0 * bits - 1)[:, :10] * scales[:, None]).sum(0) / 3
    torch.testing.assert_close(mean(packed, scales, 10), expected)
