"""Block quantisation: error bounds, packing by hand, values that must not be hidden."""

from __future__ import annotations

import pytest
import torch
from drivetrain_kernels import ArgumentError, dequantize, dequantize_reduce_quantize, quantize
from drivetrain_kernels.ops.block_format import FORMATS


def round_trip(values, format, symmetric, block=64):
    codes, parameters = quantize(values, format, block=block, symmetric=symmetric)
    count = values.numel()
    return dequantize(codes, parameters, format, numel=count, block=block, symmetric=symmetric)


@pytest.mark.parametrize(
    ("format", "symmetric", "levels"),
    [("int8", True, 127), ("int8", False, 255), ("int4", True, 7), ("int4", False, 15)],
)
def test_integer_codes_are_off_by_at_most_half_a_step(format, symmetric, levels):
    values = torch.randn(1000, generator=torch.Generator().manual_seed(0))
    error = (round_trip(values, format, symmetric) - values).abs().double()
    for start in range(0, 1000, 64):
        block = values[start : start + 64].double()
        extent = block.abs().max() if symmetric else block.max() - block.min()
        assert error[start : start + 64].max() <= extent / levels / 2 * (1 + 1e-5)


@pytest.mark.parametrize(("format", "digits"), [("fp8_e4m3", 4), ("fp8_e5m2", 3)])
def test_fp8_keeps_its_significant_digits(format, digits):
    values = torch.rand(512, generator=torch.Generator().manual_seed(0)) * 0.9 + 0.1
    error = (round_trip(values, format, True) - values).abs() / values
    assert error.max() <= 2.0**-digits


def test_int4_packs_the_first_code_into_the_low_bits():
    codes, scales = quantize(torch.tensor([7.0, -7.0, 1.0]), "int4", block=4)
    assert codes.tolist() == [0x97, 0x01]  # 7 and -7 & 15 = 9; 1 and padding
    assert scales.tolist() == [[1.0]]


def test_asymmetric_codes_start_at_the_minimum():
    codes, parameters = quantize(torch.tensor([10.0, 11.0, 25.0]), "int4", block=4, symmetric=False)
    assert codes.tolist() == [0x10, 0x0F]
    assert parameters.tolist() == [[1.0, 10.0]]


@pytest.mark.parametrize(("format", "symmetric"), FORMATS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_block_with_a_broken_value_comes_back_as_nan(format, symmetric, value):
    values = torch.ones(16)
    values[3] = value
    result = round_trip(values, format, symmetric, block=8)
    assert result[:8].isnan().all()
    torch.testing.assert_close(result[8:], torch.ones(8))


@pytest.mark.parametrize(("format", "symmetric"), FORMATS)
def test_zeros_stay_zeros(format, symmetric):
    assert torch.equal(round_trip(torch.zeros(9), format, symmetric, block=4), torch.zeros(9))


@pytest.mark.parametrize(("format", "symmetric"), FORMATS)
def test_reducing_codes_is_dequantising_adding_and_quantising(format, symmetric):
    generator = torch.Generator().manual_seed(0)
    parts = [torch.randn(300, generator=generator) for _ in range(3)]
    coded = [quantize(part, format, block=32, symmetric=symmetric) for part in parts]
    kind = {"numel": 300, "block": 32, "symmetric": symmetric}
    codes, parameters = dequantize_reduce_quantize(
        torch.stack([codes for codes, _ in coded]),
        torch.stack([parameters for _, parameters in coded]),
        format,
        scale=0.5,
        **kind,
    )
    total = sum(dequantize(*each, format, **kind).double() for each in coded) / 2
    result = dequantize(codes, parameters, format, **kind).double()
    step = {"int8": 1 / 127, "int4": 1 / 7, "fp8_e4m3": 1 / 8, "fp8_e5m2": 1 / 4}[format]
    for start in range(0, 300, 32):
        block = slice(start, start + 32)
        extent = 2 * total[block].abs().max()
        assert (result[block] - total[block]).abs().max() <= extent * step


def test_odd_blocks_are_refused_by_name():
    with pytest.raises(ArgumentError, match=r"drivetrain::quantize: block is 7; expected an even"):
        quantize(torch.ones(8), block=7)
