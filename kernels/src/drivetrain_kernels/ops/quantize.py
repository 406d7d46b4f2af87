"""Block quantisation ops; the arithmetic is :mod:`drivetrain_kernels.ops.block_format`'s."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from drivetrain_kernels.checks import Checker
from drivetrain_kernels.op import Example, Op, Refusal, Tolerance
from drivetrain_kernels.ops.block_format import (
    FORMATS,
    blocks_of,
    check_codes,
    check_format,
    check_output_dtype,
    code_count,
    decode,
    encode,
    format_of,
)
from drivetrain_kernels.registry import registry

_quantize = Checker("quantize")
_dequantize = Checker("dequantize")
_reduce = Checker("dequantize_reduce_quantize")

# Short bfloat16 values lie on rounding boundaries rather often.
_TOLERANCE = Tolerance(mismatched=1e-2)


def quantize(
    values: torch.Tensor, format: str = "int8", *, block: int = 256, symmetric: bool = True
) -> tuple[torch.Tensor, torch.Tensor]:
    """Quantise in blocks of consecutive elements (row-major order).

    Args:
        values: any shape, n elements; float32, bfloat16 or float16.
        format: ``int8``, ``int4``, ``fp8_e4m3`` or ``fp8_e5m2``; the last two symmetric only.
        block: elements per scale, even; the last block may be short.
        symmetric: codes around zero, or from the block's minimum with an offset.

    Returns:
        Codes: int8 [n] (uint8 if asymmetric), uint8 [ceil(n / 2)] for int4 (two per byte, the
        first in the low bits), or the bytes of float8 values, uint8 [n]. Parameters: float32
        [blocks, 1], the scales, or [blocks, 2], scales and offsets.

    Raises:
        ArgumentError: names the argument and what was expected.
    """
    codes, parameters = QUANTIZE.call(values, format, block, symmetric)
    return codes, parameters


def dequantize(
    codes: torch.Tensor,
    parameters: torch.Tensor,
    format: str = "int8",
    *,
    numel: int,
    block: int = 256,
    symmetric: bool = True,
    dtype: torch.dtype = torch.float32,
) -> torch.Tensor:
    """Values [numel] in ``dtype`` from what :func:`quantize` returned.

    Raises:
        ArgumentError: names the argument and what was expected.
    """
    call = (codes, parameters, format, block, symmetric, numel, dtype)
    values: torch.Tensor = DEQUANTIZE.call(*call)
    return values


def dequantize_reduce_quantize(
    codes: torch.Tensor,
    parameters: torch.Tensor,
    format: str = "int8",
    *,
    numel: int,
    block: int = 256,
    symmetric: bool = True,
    scale: float = 1.0,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum quantised contributions and quantise the sum, without a float copy of either.

    The middle of a compressed reduce-scatter: each rank receives k contributions to its slice. They
    are added in float32 in order, so every implementation gives the same bits.

    Args:
        codes: [k, count], rows as from :func:`quantize` of n values.
        parameters: [k, blocks, 1 or 2].
        format: format of codes, in and out.
        numel: n.
        block: elements per scale.
        symmetric: whether codes are symmetric.
        scale: factor of the sum, e.g. ``1 / k`` for a mean.

    Returns:
        Codes [count] and parameters [blocks, 1 or 2] of the scaled sum.

    Raises:
        ArgumentError: names the argument and what was expected.
    """
    result = REDUCE.call(codes, parameters, format, block, symmetric, numel, scale)
    return result[0], result[1]


def _quantize_reference(
    values: torch.Tensor, format: str, block: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    compute = torch.promote_types(values.dtype, torch.float32)
    return encode(values.reshape(-1).to(compute), format_of(format, symmetric), block)


def _dequantize_reference(
    codes: torch.Tensor, parameters: torch.Tensor, format: str, block: int, symmetric: bool,
    numel: int, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return decode(codes, parameters, format_of(format, symmetric), block, numel).to(dtype)


def _reduce_reference(
    codes: torch.Tensor, parameters: torch.Tensor, format: str, block: int, symmetric: bool,
    numel: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    kind = format_of(format, symmetric)
    total = decode(codes[0], parameters[0], kind, block, numel)
    for source in range(1, len(codes)):
        total = total + decode(codes[source], parameters[source], kind, block, numel)
    return encode(total * scale, kind, block)


def _quantize_check(values: torch.Tensor, format: str, block: int, symmetric: bool) -> None:
    _quantize.floating(values, "values")
    check_format(_quantize, format, block, symmetric)


def _dequantize_check(
    codes: torch.Tensor, parameters: torch.Tensor, format: str, block: int, symmetric: bool,
    numel: int, dtype: torch.dtype,
) -> None:  # fmt: skip
    kind = check_format(_dequantize, format, block, symmetric)
    check_codes(_dequantize, codes, parameters, kind, block, numel)
    check_output_dtype(_dequantize, dtype)


def _reduce_check(
    codes: torch.Tensor, parameters: torch.Tensor, format: str, block: int, symmetric: bool,
    numel: int, scale: float,
) -> None:  # fmt: skip
    kind = check_format(_reduce, format, block, symmetric)
    if codes.dim() != 2 or len(codes) == 0:
        expected = "[sources, count], not empty"
        raise _reduce.fail("codes", f"has shape {tuple(codes.shape)}", expected)
    check_codes(_reduce, codes, parameters, kind, block, numel, (len(codes),))


def _quantize_fake(
    values: torch.Tensor, format: str, block: int, symmetric: bool
) -> tuple[torch.Tensor, torch.Tensor]:
    kind, numel = format_of(format, symmetric), values.numel()
    codes = values.new_empty(code_count(numel, kind), dtype=kind.dtype)
    shape = (blocks_of(numel, block), kind.parameters)
    return codes, values.new_empty(shape, dtype=torch.promote_types(values.dtype, torch.float32))


def _dequantize_fake(
    codes: torch.Tensor, parameters: torch.Tensor, format: str, block: int, symmetric: bool,
    numel: int, dtype: torch.dtype,
) -> torch.Tensor:  # fmt: skip
    return codes.new_empty(numel, dtype=dtype)


def _reduce_fake(
    codes: torch.Tensor, parameters: torch.Tensor, format: str, block: int, symmetric: bool,
    numel: int, scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    return torch.empty_like(codes[0]), torch.empty_like(parameters[0])


# -- examples -------------------------------------------------------------------------------------


def _values(device: torch.device) -> Iterator[tuple[str, torch.Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for numel, block in ((0, 64), (1, 64), (129, 64), (1000, 2), (4099, 256)):
            values = torch.randn(numel, generator=generator).to(device, dtype)
            yield f"{name}-{numel}/{block}", values, block
        grid = torch.randn(31, 17, generator=generator).to(device, dtype)
        yield f"{name}-strided", grid.t(), 32
        yield f"{name}-unaligned", grid.view(-1)[1:], 32
    special = torch.randn(64, generator=generator)
    special[8:16] = 0
    special[16:24] = 3.0
    special[24:32] *= 1e-38
    special[33], special[41], special[50] = float("inf"), float("nan"), -float("inf")
    special[56:] = torch.tensor([3e38, -3e38] * 4)
    yield "zeros, constants, infinities", special.to(device), 8


def _quantize_examples(device: torch.device) -> Iterator[Example]:
    for label, values, block in _values(device):
        for name, symmetric in FORMATS:
            kind = "symmetric" if symmetric else "asymmetric"
            yield Example(f"{name}-{kind}-{label}", (values, name, block, symmetric))


def _dequantize_examples(device: torch.device) -> Iterator[Example]:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    for index, example in enumerate(_quantize_examples(device)):
        values, *kind = example.arguments
        codes, parameters = _quantize_reference(values.float(), *kind)
        call = (codes, parameters, *kind, values.numel(), dtypes[index % 3])
        yield Example(example.label, call)


def _reduce_examples(device: torch.device) -> Iterator[Example]:
    for index, example in enumerate(_quantize_examples(device)):
        values, *kind = example.arguments
        parts = [
            _quantize_reference(values.float().reshape(-1) * factor, *kind)
            for factor in (1.0, -0.4, 2.5)[: 1 + index % 3]
        ]
        codes, parameters = (torch.stack(part) for part in zip(*parts, strict=True))
        call = (codes, parameters, *kind, values.numel(), 1 / len(parts))
        yield Example(example.label, call)


def _quantize_refusals(device: torch.device) -> Iterator[Refusal]:
    ones = torch.ones(8, device=device)
    yield Refusal("unknown format", (ones, "int3", 8, True), "format")
    yield Refusal("asymmetric fp8", (ones, "fp8_e4m3", 8, False), "format")
    yield Refusal("odd block", (ones, "int8", 7, True), "block")
    yield Refusal("integers", (ones.int(), "int8", 8, True), "values")


def _dequantize_refusals(device: torch.device) -> Iterator[Refusal]:
    codes = torch.zeros(16, dtype=torch.int8, device=device)
    scales = torch.ones(2, 1, device=device)
    kind, wanted = ("int8", 8, True), (16, torch.float32)
    unsigned = codes.to(torch.uint8)
    yield Refusal("unsigned codes", (unsigned, scales, *kind, *wanted), "codes")
    yield Refusal("other size", (codes, scales, *kind, 15, torch.float32), "codes")
    yield Refusal("one scale", (codes, scales[:1], *kind, *wanted), "parameters")
    yield Refusal("to integers", (codes, scales, *kind, 16, torch.int32), "dtype")


def _reduce_refusals(device: torch.device) -> Iterator[Refusal]:
    codes = torch.zeros(16, dtype=torch.int8, device=device)
    scales = torch.ones(2, 1, device=device)
    yield Refusal("no source axis", (codes, scales, "int8", 8, True, 16, 1.0), "codes")
    one = (codes[None], scales.expand(2, 2, 1).contiguous(), "int8", 8, True, 16, 1.0)
    yield Refusal("scales of two sources", one, "parameters")


QUANTIZE = registry.define(
    Op(
        "quantize",
        "(Tensor values, str format, int block, bool symmetric) -> (Tensor, Tensor)",
        reference=_quantize_reference,
        check=_quantize_check,
        examples=_quantize_examples,
        refusals=_quantize_refusals,
        fake=_quantize_fake,
        tolerance=_TOLERANCE,
    )
)
DEQUANTIZE = registry.define(
    Op(
        "dequantize",
        "(Tensor codes, Tensor parameters, str format, int block, bool symmetric, int numel, "
        "ScalarType dtype) -> Tensor",
        reference=_dequantize_reference,
        check=_dequantize_check,
        examples=_dequantize_examples,
        refusals=_dequantize_refusals,
        fake=_dequantize_fake,
    )
)
REDUCE = registry.define(
    Op(
        "dequantize_reduce_quantize",
        "(Tensor codes, Tensor parameters, str format, int block, bool symmetric, int numel, "
        "float scale) -> (Tensor, Tensor)",
        reference=_reduce_reference,
        check=_reduce_check,
        examples=_reduce_examples,
        refusals=_reduce_refusals,
        fake=_reduce_fake,
        tolerance=_TOLERANCE,
    )
)
