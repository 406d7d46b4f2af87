"""What the conformance kit cannot compare: NaN, and bits that float64 would not give."""

from __future__ import annotations

import pytest
import torch
from drivetrain_kernels import fake_quantize, pack_codes, unpack_codes
from drivetrain_kernels.ops.codes import PACK_CODES, UNPACK_CODES
from drivetrain_kernels.ops.fake_quantize import FAKE_QUANTIZE
from drivetrain_kernels.registry import REFERENCE


@pytest.fixture(autouse=True)
def native():
    if FAKE_QUANTIZE.provider("cpu") == REFERENCE:
        pytest.skip("the native kernels are not in use")


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8, 16])
def test_kernels_give_the_bits_of_the_reference(bits, symmetric):
    generator = torch.Generator().manual_seed(bits)
    for shape in ((1, 70_001), (300, 129), (3, 4096)):
        groups = torch.randn(shape, generator=generator) * 3 + 1
        groups[0, 5:9] = 1000.0
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            given = groups.to(dtype)
            wanted = FAKE_QUANTIZE.reference(given, bits, symmetric)
            assert torch.equal(fake_quantize(given, bits, symmetric=symmetric), wanted)


@pytest.mark.parametrize("symmetric", [True, False])
def test_what_is_no_number_makes_its_group_nan(symmetric):
    groups = torch.randn(5, 200, generator=torch.Generator().manual_seed(0))
    groups[1, 3], groups[2, 190], groups[3, 0] = float("inf"), float("nan"), -float("inf")
    found = fake_quantize(groups, 4, symmetric=symmetric)
    assert found[1:4].isnan().all()
    assert found[[0, 4]].isfinite().all()
    torch.testing.assert_close(
        found, FAKE_QUANTIZE.reference(groups, 4, symmetric), equal_nan=True, rtol=0, atol=0
    )


@pytest.mark.parametrize("bits", range(2, 9))
def test_many_rows_are_packed_as_the_reference_does(bits):
    codes = torch.randint(0, 1 << bits, (700, 97), dtype=torch.uint8)
    words = pack_codes(codes, bits)
    assert torch.equal(words, PACK_CODES.reference(codes, bits))
    assert torch.equal(unpack_codes(words, bits, 97), codes)
    assert torch.equal(UNPACK_CODES.reference(words, bits, 97), codes)
