"""Products of rounded rows with integer weights in blocks: W8A8, and 4 or 8 bits in groups."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import linear, pad

from drivetrain_kernels.checks import LOW_PRECISION, Checker
from drivetrain_kernels.op import Example, Op, Refusal, Tolerance
from drivetrain_kernels.registry import registry

PANEL = 32
"""Outputs of one panel of a packed weight."""
MOST_BLOCK = 1 << 16
"""Inputs of a block: products of bytes are summed in 32 bits."""

_checker = Checker("block_linear")


def pack_blocks(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Codes [out, blocks, block] in the order in which a processor reads them.

    A word of 4 bytes holds four consecutive inputs of one output, and 32 outputs lie side by side.
    In a byte of 4-bit codes the low one belongs to the first half of the block, the high one to the
    same place of the second half.

    Args:
        codes: uint8 below ``2**bits``; the block is a multiple of 4, with 4 bits of 8.
        bits: 4 or 8.

    Returns:
        uint8 [ceil(out / 32), blocks, block * bits / 32, 32, 4]; what is missing is 0.
    """
    full = pad(codes, (0, 0, 0, 0, 0, -len(codes) % PANEL))
    if bits == 4:
        low, high = full.chunk(2, dim=2)
        full = low | (high << 4)
    outputs, blocks, width = full.shape
    panels = full.view(outputs // PANEL, PANEL, blocks, width // 4, 4)
    return panels.permute(0, 2, 3, 1, 4).contiguous()


def unpack_blocks(panels: torch.Tensor, bits: int, outputs: int) -> torch.Tensor:
    """The codes [outputs, blocks, block] of :func:`pack_blocks`."""
    count, blocks, words, _, _ = panels.shape
    full = panels.permute(0, 3, 1, 2, 4).reshape(count * PANEL, blocks, words * 4)[:outputs]
    return full if bits == 8 else torch.cat([full & 15, full >> 4], dim=2)


def pack_parameters(parameters: torch.Tensor) -> torch.Tensor:
    """Scales and offsets [out, blocks, 1 or 2] as float16 [panels, blocks, 1 or 2, 32]."""
    full = pad(parameters.half(), (0, 0, 0, 0, 0, -len(parameters) % PANEL))
    return full.view(-1, PANEL, *full.shape[1:]).permute(0, 2, 3, 1).contiguous()


def block_linear(
    x: torch.Tensor, codes: torch.Tensor, parameters: torch.Tensor, bits: int, outputs: int
) -> torch.Tensor:
    """``x @ weight.T``, with the rows of x rounded to signed bytes, block by block.

    A weight is ``scale * code + offset``; without offsets 0 is code 128 of 8 bits, or 8 of 4 bits.
    With one block a row this is W8A8 with a scale a token and a scale an output (LLM.int8, arXiv
    2208.07339, without outliers); blocks of 32 are the arithmetic of GGUF's Q4_0, Q4_1 and Q8_0.
    Sums inside of a block are exact, so a row's bits do not depend on the other rows.

    Args:
        x: [rows, in], contiguous; float32, bfloat16 or float16. A row's block with an infinity or
            NaN gives NaN.
        codes: of :func:`pack_blocks`; the last block may be longer than the inputs that are left.
        parameters: float16 [panels, blocks, 1 or 2, 32]: scales, and offsets.
        bits: 4 or 8.
        outputs: out.

    Returns:
        [rows, out], dtype of ``x``.
    """
    result: torch.Tensor = BLOCK_LINEAR.call(x, codes, parameters, bits, outputs)
    return result


def block_of(codes: torch.Tensor, bits: int) -> int:
    """Inputs of a block of packed codes."""
    return int(codes.shape[2]) * 32 // bits


def _reference(
    x: torch.Tensor, codes: torch.Tensor, parameters: torch.Tensor, bits: int, outputs: int
) -> torch.Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    block, blocks = block_of(codes, bits), codes.shape[1]
    weights = decoded(codes, parameters, bits, outputs, compute).flatten(1)
    rows = pad(x.to(compute), (0, blocks * block - x.shape[1])).view(len(x), blocks, block)
    largest = rows.abs().amax(2, keepdim=True)
    tiny = largest <= 1e-35
    inverse = torch.where(tiny, 0.0, 127.0 / largest)
    steps = torch.where(torch.isfinite(largest), torch.round(rows * inverse), torch.nan)
    rounded = steps * torch.where(tiny, 0.0, largest / 127.0)
    return linear(rounded.flatten(1), weights).to(x.dtype)


def decoded(
    codes: torch.Tensor, parameters: torch.Tensor, bits: int, outputs: int, dtype: torch.dtype
) -> torch.Tensor:
    """Weights [outputs, blocks, block]."""
    steps = unpack_blocks(codes, bits, outputs).to(dtype)
    flat = parameters.to(dtype).permute(0, 3, 1, 2).flatten(0, 1)[:outputs]
    if flat.shape[2] == 1:
        return (steps - (1 << (bits - 1))) * flat
    return steps * flat[:, :, :1] + flat[:, :, 1:]


def _check(
    x: torch.Tensor, codes: torch.Tensor, parameters: torch.Tensor, bits: int, outputs: int
) -> None:
    _checker.floating(x, "x")
    if x.dim() != 2 or not x.is_contiguous():
        raise _checker.fail("x", f"is {list(x.shape)}", "contiguous rows")
    if bits not in (4, 8):
        raise _checker.fail("bits", f"is {bits}", "4 or 8")
    _checker.dtype(codes, "codes", torch.uint8)
    panels = -(-outputs // PANEL)
    if codes.dim() != 5 or codes.shape[3:] != (PANEL, 4) or not codes.is_contiguous():
        expected = "contiguous [panels, blocks, words, 32, 4]"
        raise _checker.fail("codes", f"is {list(codes.shape)}", expected)
    block, blocks = block_of(codes, bits), codes.shape[1]
    if len(codes) != panels or not 0 <= blocks * block - x.shape[1] < max(1, block):
        expected = f"{panels} panels whose blocks hold {x.shape[1]} inputs"
        raise _checker.fail("codes", f"is {list(codes.shape)}", expected)
    if block > MOST_BLOCK:
        raise _checker.fail("codes", f"has blocks of {block}", f"at most {MOST_BLOCK} inputs")
    if parameters.dtype not in (torch.float16, torch.float64):
        raise _checker.fail("parameters", f"is {parameters.dtype}", "float16")
    shapes = [[panels, blocks, number, PANEL] for number in (1, 2)]
    if list(parameters.shape) not in shapes or not parameters.is_contiguous():
        expected = f"contiguous {shapes[0]} or {shapes[1]}"
        raise _checker.fail("parameters", f"is {list(parameters.shape)}", expected)


def _call(
    device: torch.device, dtype: torch.dtype, bits: int, offsets: bool, block: int,
    rows: int, outputs: int, inputs: int,
) -> tuple[object, ...]:  # fmt: skip
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(rows, inputs, generator=generator).to(device, dtype)
    blocks = -(-inputs // block)
    codes = torch.randint(1 << bits, (outputs, blocks, block), generator=generator)
    parameters = torch.rand(outputs, blocks, 1 + offsets, generator=generator) / (1 << bits)
    packed = pack_blocks(codes.to(device, torch.uint8), bits)
    return x, packed, pack_parameters(parameters.to(device)), bits, outputs


# (block, rows, outputs, inputs): one block a row with and without a rest; groups; no row at all.
_SIZES = ((64, 1, 64, 64), (72, 9, 33, 70), (32, 2, 40, 96), (64, 14, 8, 128), (16, 0, 8, 16))


def _examples(device: torch.device) -> Iterator[Example]:
    for dtype in (torch.float32, *LOW_PRECISION):
        for bits, offsets in ((8, False), (8, True), (4, False), (4, True)):
            for size in _SIZES:
                label = f"{str(dtype).removeprefix('torch.')}-{bits}{'+' * offsets}-{size}"
                yield Example(label, _call(device, dtype, bits, offsets, *size))


def _refusals(device: torch.device) -> Iterator[Refusal]:
    good = _call(device, torch.float32, 8, False, 32, 2, 40, 64)
    for label, position, value, name in (
        ("fewer inputs", 0, torch.ones(2, 30, device=device), "codes"),
        ("a vector", 0, torch.ones(64, device=device), "x"),
        ("signed codes", 1, good[1].char(), "codes"),  # type: ignore[attr-defined]
        ("other panels", 1, good[1][:1].contiguous(), "codes"),  # type: ignore[index]
        ("wide parameters", 2, good[2].float(), "parameters"),  # type: ignore[attr-defined]
        ("fewer parameters", 2, good[2][:, :1].contiguous(), "parameters"),  # type: ignore[index]
        ("5 bits", 3, 5, "bits"),
    ):
        call = list(good)
        call[position] = value
        yield Refusal(label, tuple(call), name)


def _fake(
    x: torch.Tensor, codes: torch.Tensor, parameters: torch.Tensor, bits: int, outputs: int
) -> torch.Tensor:
    return x.new_empty(len(x), outputs)


BLOCK_LINEAR = registry.define(
    Op(
        "block_linear",
        "(Tensor x, Tensor codes, Tensor parameters, int bits, SymInt outputs) -> Tensor",
        reference=_reference,
        check=_check,
        examples=_examples,
        refusals=_refusals,
        fake=_fake,
        # A value near the middle between two codes may be rounded to either: one step of x.
        tolerance=Tolerance(
            {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2},
            {torch.float64: 1e-9, torch.float32: 1e-3, torch.float16: 6e-3, torch.bfloat16: 4e-2},
        ),
        group="serving",
    )
)
