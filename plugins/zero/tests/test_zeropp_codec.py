"""Numbers as blocks of small integers: error, range, format; and what is not encoded."""

from __future__ import annotations

import pytest
import torch
from drivetrain_zero.compressed import block_codec
from drivetrain_zero.compressed.block_codec import BLOCK, BlockCodec

LARGEST = {"int8": 127, "int4": 7}
CODECS = [BlockCodec("int8"), BlockCodec("int4")]


@pytest.fixture(params=["kernels", "plain torch"], autouse=True)
def arithmetic(request, monkeypatch):
    """Every claim holds with drivetrain-kernels and without."""
    if request.param == "kernels":
        pytest.importorskip("drivetrain_kernels")
    else:
        monkeypatch.setattr(block_codec, "find_spec", lambda name: None)
    block_codec._kernels.cache_clear()
    yield
    block_codec._kernels.cache_clear()


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.format)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("numel", [1, 7, 255, 256, 257, 1000, 4099])
def test_no_number_is_off_by_more_than_half_a_step_of_its_block(codec, dtype, numel):
    values = torch.randn(numel, generator=torch.Generator().manual_seed(numel)).to(dtype)
    message = torch.empty(codec.message_bytes(numel), dtype=torch.uint8)
    codec.encode(values, message)
    errors = (codec.decode(message, numel).double() - values.double()).abs()
    for start in range(0, numel, BLOCK):
        block = values[start : start + BLOCK].double()
        half = block.abs().max() / LARGEST[codec.format] / 2
        assert errors[start : start + BLOCK].max() <= half * (1 + 1e-5)


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.format)
def test_errors_of_rounding_cancel_on_average(codec):
    values = torch.rand(200_000, generator=torch.Generator().manual_seed(0)) * 2 - 1
    errors = codec.rounded(values).double() - values.double()
    step = 1 / LARGEST[codec.format]
    assert abs(errors.mean()) < 0.01 * step
    assert errors.std() == pytest.approx(step / 12**0.5, rel=0.02)  # of uniform errors


def test_a_message_is_scales_and_then_codes():
    values = torch.tensor([7.0, -7.0, 3.0, 0.0, -1.0])
    message = torch.zeros(16, dtype=torch.uint8)
    BlockCodec("int4").encode(values, message)
    assert message[:4].view(torch.float32).item() == 1.0
    # 7 and -7, 3 and 0, -1 alone; the first of two in the low half.
    assert message[4:7].tolist() == [0x97, 0x03, 0x0F]


def test_bytes_of_a_message():
    assert BlockCodec("int8").message_bytes(1024) == 4 * 4 + 1024
    assert BlockCodec("int4").message_bytes(1024) == 4 * 4 + 512
    assert BlockCodec("int8").message_bytes(257) == 272  # 2 scales, 257 codes: 265, aligned
    assert BlockCodec("int4").message_bytes(3) == 16


def test_bfloat16_beyond_the_range_of_float16_survives():
    values = torch.tensor([3e38, -1e38, 65536.0, 0.0], dtype=torch.bfloat16)
    rounded = BlockCodec("int8").rounded(values)
    assert torch.isfinite(rounded).all()
    assert (rounded.double() - values.double()).abs().max() <= 3e38 / 254 * 1.01


@pytest.mark.parametrize("bad", [float("inf"), -float("inf"), float("nan")])
@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.format)
def test_what_is_not_finite_spoils_its_block_and_no_other(codec, bad):
    values = torch.ones(3 * BLOCK)
    values[BLOCK + 5] = bad
    rounded = codec.rounded(values)
    assert rounded[BLOCK : 2 * BLOCK].isnan().all()
    assert torch.equal(rounded[:BLOCK], torch.ones(BLOCK))
    assert torch.equal(rounded[2 * BLOCK :], torch.ones(BLOCK))


@pytest.mark.parametrize("codec", CODECS, ids=lambda codec: codec.format)
def test_zeros_and_the_smallest_numbers_come_back_as_zeros(codec):
    values = torch.zeros(2 * BLOCK)
    values[BLOCK:] = 1e-40
    assert torch.equal(codec.rounded(values), torch.zeros(2 * BLOCK))


def test_a_sum_of_messages_is_that_of_what_they_hold():
    codec = BlockCodec("int4")
    rows = torch.randn(3, 300, generator=torch.Generator().manual_seed(1))
    messages = torch.zeros(3, codec.message_bytes(300), dtype=torch.uint8)
    for row, message in zip(rows, messages, strict=True):
        codec.encode(row, message)
    held = torch.stack([codec.rounded(row) for row in rows])
    torch.testing.assert_close(codec.sum(messages, 300), held.sum(0), rtol=1e-6, atol=1e-6)


def test_what_would_not_become_smaller_or_is_no_float_is_not_encoded():
    codec = BlockCodec("int8")
    assert codec.shrinks(torch.ones(64, dtype=torch.bfloat16))
    assert not codec.shrinks(torch.ones(8, dtype=torch.bfloat16))
    assert not codec.shrinks(torch.ones(4096, dtype=torch.int32))
    assert not codec.shrinks(torch.ones(4096, dtype=torch.float64))


def test_kernels_and_plain_torch_send_the_same_bytes(monkeypatch):
    pytest.importorskip("drivetrain_kernels")
    values = torch.randn(5000, generator=torch.Generator().manual_seed(2)) * 1e3
    values[600:900] = 0
    values[1300] = float("nan")
    for codec in CODECS:
        sent = []
        for spec in (lambda name: True, lambda name: None):
            monkeypatch.setattr(block_codec, "find_spec", spec)
            block_codec._kernels.cache_clear()
            message = torch.zeros(codec.message_bytes(5000), dtype=torch.uint8)
            codec.encode(values, message)
            sent.append((message, codec.decode(message, 5000)))
        assert torch.equal(sent[0][0], sent[1][0])
        assert torch.equal(sent[0][1].nan_to_num(7), sent[1][1].nan_to_num(7))
