"""Codes of 2 to 8 bits in words of 32 bits, one after another."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from drivetrain_kernels.checks import Checker, name_of
from drivetrain_kernels.op import Example, Op, Refusal
from drivetrain_kernels.registry import registry

_pack = Checker("pack_codes")
_unpack = Checker("unpack_codes")


def pack_codes(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Pack rows of codes densely: the first lies in the lowest bits, and codes may cross words.

    Args:
        codes: uint8 [rows, n], contiguous; what is above ``bits`` bits of each is dropped.
        bits: of a code, 2 to 8.

    Returns:
        int32 [rows, ceil(n * bits / 32)]; bits that are left over are 0.

    Raises:
        ArgumentError: names the argument and what was expected.
    """
    words: torch.Tensor = PACK_CODES.call(codes, bits)
    return words


def unpack_codes(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """Codes [rows, count], uint8, from what :func:`pack_codes` returned.

    Raises:
        ArgumentError: names the argument and what was expected.
    """
    codes: torch.Tensor = UNPACK_CODES.call(words, bits, count)
    return codes


def _pack_reference(codes: torch.Tensor, bits: int) -> torch.Tensor:
    rows, count = codes.shape
    wide = pad(codes.to(torch.int64) & ((1 << bits) - 1), (0, -count % 32)).view(rows, -1, 32)
    words = torch.zeros(rows, wide.shape[1], bits + 1, dtype=torch.int64, device=codes.device)
    for at in range(32):  # 32 codes fill `bits` words
        word, shift = divmod(at * bits, 32)
        spread = wide[:, :, at] << shift
        words[:, :, word] |= spread & 0xFFFFFFFF
        words[:, :, word + 1] |= spread >> 32
    flat = words[:, :, :bits].flatten(1)[:, : words_of(count, bits)]
    return torch.where(flat >= 2**31, flat - 2**32, flat).to(torch.int32)


def _unpack_reference(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    wide = pad(words.to(torch.int64) & 0xFFFFFFFF, (0, 1))
    start = torch.arange(count, device=words.device) * bits
    word, shift = start // 32, start % 32
    pair = wide[:, word] | (wide[:, word + 1] << 32)
    return (pair >> shift & ((1 << bits) - 1)).to(torch.uint8)


def words_of(count: int, bits: int) -> int:
    """Words of a row of ``count`` codes."""
    return -(-count * bits // 32)


def _check_rows(checker: Checker, rows: torch.Tensor, argument: str, dtype: torch.dtype) -> None:
    checker.dtype(rows, argument, dtype)
    if rows.dim() != 2 or not rows.is_contiguous():
        shape = f"is {name_of(rows.dtype)} {list(rows.shape)}"
        raise checker.fail(argument, shape, "contiguous [rows, numbers]")


def _check_bits(checker: Checker, bits: int) -> None:
    if not 2 <= bits <= 8:
        raise checker.fail("bits", f"is {bits}", "2 to 8")


def _pack_check(codes: torch.Tensor, bits: int) -> None:
    _check_rows(_pack, codes, "codes", torch.uint8)
    _check_bits(_pack, bits)


def _unpack_check(words: torch.Tensor, bits: int, count: int) -> None:
    _check_rows(_unpack, words, "words", torch.int32)
    _check_bits(_unpack, bits)
    if count < 0 or words_of(count, bits) != words.shape[1]:
        expected = f"as many as {words.shape[1]} words of {bits} bits hold"
        raise _unpack.fail("count", f"is {count}", expected)


_SHAPES = ((1, 0), (1, 1), (3, 31), (2, 33), (5, 40), (4, 1000), (3, 4099))


def _pack_examples(device: torch.device) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)
    for bits in range(2, 9):
        for rows, count in _SHAPES:
            codes = torch.randint(0, 256, (rows, count), generator=generator, dtype=torch.uint8)
            yield Example(f"{bits} bits of {rows}x{count}", (codes.to(device), bits))


def _unpack_examples(device: torch.device) -> Iterator[Example]:
    for example in _pack_examples(device):
        codes, bits = example.arguments
        call = (_pack_reference(codes, bits), bits, codes.shape[1])
        yield Example(example.label, call)


def _pack_refusals(device: torch.device) -> Iterator[Refusal]:
    codes = torch.zeros(2, 8, dtype=torch.uint8, device=device)
    yield Refusal("one bit", (codes, 1), "bits")
    yield Refusal("signed", (codes.to(torch.int8), 4), "codes")
    yield Refusal("a vector", (codes[0], 4), "codes")
    yield Refusal("turned", (codes.T, 4), "codes")


def _unpack_refusals(device: torch.device) -> Iterator[Refusal]:
    words = torch.zeros(2, 1, dtype=torch.int32, device=device)
    yield Refusal("nine bits", (words, 9, 3), "bits")
    yield Refusal("long words", (words.long(), 4, 8), "words")
    yield Refusal("more codes", (words, 4, 9), "count")


PACK_CODES = registry.define(
    Op(
        "pack_codes",
        "(Tensor codes, int bits) -> Tensor",
        reference=_pack_reference,
        check=_pack_check,
        examples=_pack_examples,
        refusals=_pack_refusals,
        fake=lambda codes, bits: codes.new_empty(
            (codes.shape[0], words_of(codes.shape[1], bits)), dtype=torch.int32
        ),
    )
)
UNPACK_CODES = registry.define(
    Op(
        "unpack_codes",
        "(Tensor words, int bits, int count) -> Tensor",
        reference=_unpack_reference,
        check=_unpack_check,
        examples=_unpack_examples,
        refusals=_unpack_refusals,
        fake=lambda words, bits, count: words.new_empty((len(words), count), dtype=torch.uint8),
    )
)
