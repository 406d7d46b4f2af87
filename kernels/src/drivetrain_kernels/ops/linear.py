"""Products with weights that are packed once: in panels of columns, or quantised in groups."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import linear, pad

from drivetrain_kernels.checks import LOW_PRECISION, Checker
from drivetrain_kernels.op import Example, Op, Refusal, Tolerance
from drivetrain_kernels.ops.block_format import check_codes, check_format, decode, encode, format_of
from drivetrain_kernels.registry import registry

PANEL = 32
"""Outputs of one panel of a packed weight."""

_packed = Checker("packed_linear")
_quantized = Checker("quantized_linear")


def pack_panels(weight: torch.Tensor) -> torch.Tensor:
    """Weight [out, in] in the order in which a processor reads it.

    A word of 4 bytes holds consecutive inputs of one output: two in 16-bit dtypes, one in float32.
    32 outputs of the same inputs lie side by side, so a vector holds as many outputs as it has
    words, and sums need no reduction across it.

    Returns:
        [ceil(out / 32), ceil(in / w), 32, w] with w inputs a word; what is missing is 0.
    """
    word = max(1, 4 // weight.element_size())
    rows, columns = -weight.shape[0] % PANEL, -weight.shape[1] % word
    full = pad(weight, (0, columns, 0, rows))
    panels = full.view(-1, PANEL, full.shape[1] // word, word)
    return panels.transpose(1, 2).contiguous()


def packed_linear(
    x: torch.Tensor, panels: torch.Tensor, bias: torch.Tensor | None, outputs: int
) -> torch.Tensor:
    """``x @ weight.T + bias`` for a weight from :func:`pack_panels`; summed in float32.

    Sums of a row are made in the order of its inputs and do not depend on the other rows.

    Args:
        x: [rows, in], contiguous; float32, bfloat16 or float16.
        panels: the packed weight, dtype of ``x``.
        bias: [out], dtype of ``x``, or ``None``.
        outputs: out.

    Returns:
        [rows, out], dtype of ``x``.
    """
    result: torch.Tensor = PACKED_LINEAR.call(x, panels, bias, outputs)
    return result


def quantized_linear(
    x: torch.Tensor, codes: torch.Tensor, parameters: torch.Tensor, format: str, *, block: int,
    symmetric: bool, outputs: int,
) -> torch.Tensor:  # fmt: skip
    """``x @ weight.T`` for a weight [out, in] from ``quantize``, whose rows are whole blocks.

    Args:
        x: [rows, in], contiguous; float32, bfloat16 or float16.
        codes: of ``quantize(weight, format, block=block, symmetric=symmetric)``.
        parameters: likewise.
        format: ``int8`` or ``int4``.
        block: elements of a group; divides in.
        symmetric: as in ``quantize``.
        outputs: out.

    Returns:
        [rows, out], dtype of ``x``; summed in float32.
    """
    call = (x, codes, parameters, format, block, symmetric, outputs)
    result: torch.Tensor = QUANTIZED_LINEAR.call(*call)
    return result


def _packed_reference(
    x: torch.Tensor, panels: torch.Tensor, bias: torch.Tensor | None, outputs: int
) -> torch.Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    weight = panels.transpose(1, 2).flatten(2).flatten(0, 1)[:outputs, : x.shape[1]]
    wide = None if bias is None else bias.to(compute)
    return linear(x.to(compute), weight.to(compute), wide).to(x.dtype)


def _packed_check(
    x: torch.Tensor, panels: torch.Tensor, bias: torch.Tensor | None, outputs: int
) -> None:
    _rows(_packed, x)
    _packed.dtype(panels, "panels", x.dtype)
    word = panels.shape[-1]
    expected = [-(-outputs // PANEL), -(-x.shape[1] // word), PANEL, word]
    if list(panels.shape) != expected or not panels.is_contiguous():
        raise _packed.fail("panels", f"is {list(panels.shape)}", f"contiguous {expected}")
    if bias is not None:
        _packed.dtype(bias, "bias", x.dtype)
        _packed.numel(bias, "bias", outputs, "outputs")


def _quantized_reference(
    x: torch.Tensor, codes: torch.Tensor, parameters: torch.Tensor, format: str, block: int,
    symmetric: bool, outputs: int,
) -> torch.Tensor:  # fmt: skip
    compute = torch.promote_types(x.dtype, torch.float32)
    kind, numel = format_of(format, symmetric), outputs * x.shape[1]
    weight = decode(codes, parameters, kind, block, numel).view(outputs, -1)
    return linear(x.to(compute), weight.to(compute)).to(x.dtype)


def _quantized_check(
    x: torch.Tensor, codes: torch.Tensor, parameters: torch.Tensor, format: str, block: int,
    symmetric: bool, outputs: int,
) -> None:  # fmt: skip
    _rows(_quantized, x)
    if format not in ("int8", "int4"):
        raise _quantized.fail("format", f"is {format!r}", "int8 or int4")
    kind = check_format(_quantized, format, block, symmetric)
    if x.shape[1] % block:
        raise _quantized.fail("block", f"is {block}", f"a divisor of the {x.shape[1]} inputs")
    check_codes(_quantized, codes, parameters, kind, block, outputs * x.shape[1])


def _rows(checker: Checker, x: torch.Tensor) -> None:
    checker.floating(x, "x")
    if x.dim() != 2 or not x.is_contiguous():
        raise checker.fail("x", f"is {list(x.shape)}", "contiguous rows")


def _normal(device: torch.device, dtype: torch.dtype, seed: int, *sizes: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(sizes, generator=generator).to(device, dtype)


_SIZES = ((1, 64, 64), (1, 33, 70), (4, 32, 576), (13, 50, 31), (30, 96, 40), (0, 8, 8))


def _packed_examples(device: torch.device) -> Iterator[Example]:
    for dtype in (torch.float32, *LOW_PRECISION):
        for rows, outputs, inputs in _SIZES:
            x = _normal(device, dtype, 0, rows, inputs)
            panels = pack_panels(_normal(device, dtype, 1, outputs, inputs))
            bias = _normal(device, dtype, 2, outputs) if outputs % 3 else None
            label = f"{str(dtype).removeprefix('torch.')}-{rows}x{inputs}x{outputs}"
            yield Example(label, (x, panels, bias, outputs))


def _quantized_examples(device: torch.device) -> Iterator[Example]:
    for dtype in (torch.float32, *LOW_PRECISION):
        for name, symmetric in (("int8", True), ("int8", False), ("int4", True), ("int4", False)):
            for rows, outputs, inputs, block in ((1, 64, 96, 32), (2, 33, 128, 64), (9, 8, 40, 20)):
                x = _normal(device, dtype, 0, rows, inputs)
                weight = _normal(device, torch.float32, 1, outputs * inputs)
                codes, parameters = encode(weight, format_of(name, symmetric), block)
                kind = f"{name}{'' if symmetric else ' offset'}"
                label = f"{str(dtype).removeprefix('torch.')}-{kind}-{rows}x{inputs}x{outputs}"
                yield Example(label, (x, codes, parameters, name, block, symmetric, outputs))


def _packed_refusals(device: torch.device) -> Iterator[Refusal]:
    x, panels = torch.ones(2, 8, device=device), pack_panels(torch.ones(8, 8, device=device))
    yield Refusal("other width", (x[:, :4].contiguous(), panels, None, 8), "panels")
    yield Refusal("other dtype", (x.half(), panels, None, 8), "panels")
    yield Refusal("short bias", (x, panels, x[0, :4], 8), "bias")
    yield Refusal("a vector", (x[0], panels, None, 8), "x")


def _quantized_refusals(device: torch.device) -> Iterator[Refusal]:
    x = torch.ones(2, 8, device=device)
    codes, parameters = encode(torch.ones(64, device=device), format_of("int8", True), 4)
    yield Refusal("float8", (x, codes, parameters, "fp8_e4m3", 4, True, 8), "format")
    yield Refusal("odd blocks", (x, codes, parameters, "int8", 6, True, 8), "block")
    yield Refusal("more outputs", (x, codes, parameters, "int8", 4, True, 9), "codes")


def _packed_fake(
    x: torch.Tensor, panels: torch.Tensor, bias: torch.Tensor | None, outputs: int
) -> torch.Tensor:
    return x.new_empty(len(x), outputs)


def _quantized_fake(x: torch.Tensor, *rest: object) -> torch.Tensor:
    outputs = rest[-1]
    assert isinstance(outputs, (int, torch.SymInt))
    return x.new_empty(len(x), outputs)


# Sums of a few hundred products in another order than the reference's.
_TOLERANCE = Tolerance(
    {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2},
    {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2},
)
PACKED_LINEAR = registry.define(
    Op(
        "packed_linear",
        "(Tensor x, Tensor panels, Tensor? bias, SymInt outputs) -> Tensor",
        reference=_packed_reference,
        check=_packed_check,
        examples=_packed_examples,
        refusals=_packed_refusals,
        fake=_packed_fake,
        tolerance=_TOLERANCE,
        group="serving",
    )
)
QUANTIZED_LINEAR = registry.define(
    Op(
        "quantized_linear",
        "(Tensor x, Tensor codes, Tensor parameters, str format, int block, bool symmetric, "
        "SymInt outputs) -> Tensor",
        reference=_quantized_reference,
        check=_quantized_check,
        examples=_quantized_examples,
        refusals=_quantized_refusals,
        fake=_quantized_fake,
        tolerance=_TOLERANCE,
        group="serving",
    )
)
