"""Products with weights that are floating-point numbers of 8 or 6 bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import linear, pad

from drivetrain_kernels.checks import LOW_PRECISION, Checker
from drivetrain_kernels.op import Example, Op, Refusal, Tolerance
from drivetrain_kernels.registry import registry

PANEL = 32
"""Outputs of one panel of a packed weight."""
LARGEST = {"fp8_e4m3": 448.0, "fp6_e3m2": 28.0}
"""The largest number of each format; formats of Micikevicius et al. (arXiv 2209.05433) and of the
OCP specification of microscaling formats. FP6 has neither infinity nor NaN."""

_checker = Checker("minifloat_linear")


def encode_minifloat(steps: torch.Tensor, format: str) -> torch.Tensor:
    """Codes, uint8, of the numbers nearest to ``steps``; ties to even, large ones saturate."""
    steps = steps.float().clamp(-LARGEST[format], LARGEST[format])
    if format == "fp8_e4m3":
        return steps.to(torch.float8_e4m3fn).view(torch.uint8)
    magnitude = steps.abs()
    # The distance of neighbours: 2**-4 below 1/2, as exponents end at -2, and then with each.
    exponent = torch.frexp(magnitude).exponent.clamp(min=-1) - 1
    spacing = torch.exp2((exponent - 2).float())
    whole = torch.round(magnitude / spacing)
    value = whole * spacing
    exponent = torch.frexp(value).exponent.clamp(min=-1) - 1  # rounding may reach the next one
    spacing = torch.exp2((exponent - 2).float())
    fraction = torch.round(value / spacing).int()
    codes = torch.where(fraction >= 4, ((exponent + 3) << 2) + fraction - 4, fraction)
    return (codes | (torch.signbit(steps).int() << 5)).to(torch.uint8)


def decode_minifloat(codes: torch.Tensor, format: str) -> torch.Tensor:
    """Numbers, float32, of codes."""
    if format == "fp8_e4m3":
        return codes.view(torch.float8_e4m3fn).float()
    whole = codes.int()
    exponent, fraction = whole >> 2 & 7, whole & 3
    small = fraction.float() / 16
    large = (4 + fraction).float() * torch.exp2((exponent - 5).float())
    return torch.where(exponent == 0, small, large) * (1 - 2 * (whole >> 5)).float()


def pack_minifloats(codes: torch.Tensor, format: str) -> torch.Tensor:
    """Codes [out, in] in the order in which a processor reads them.

    Four inputs of 32 outputs lie together, input by input. Six-bit codes are cut: their low four
    bits in nibbles, an even input's before the next one's, and the high pairs of all four in a
    byte.

    Returns:
        uint8 [ceil(out / 32), ceil(in / 4), 128 or 96]; what is missing is 0.
    """
    full = pad(codes, (0, -codes.shape[1] % 4, 0, -len(codes) % PANEL))
    panels, groups = len(full) // PANEL, full.shape[1] // 4
    each = full.view(panels, PANEL, groups, 4).permute(0, 2, 3, 1)  # [panels, groups, 4, 32]
    if format == "fp8_e4m3":
        return each.reshape(panels, groups, 4 * PANEL).contiguous()
    low, high = each & 15, each >> 4
    nibbles = low[:, :, 0::2] | (low[:, :, 1::2] << 4)
    first, second, third, fourth = high.unbind(2)
    pairs = first | (second << 2) | (third << 4) | (fourth << 6)
    return torch.cat([nibbles.flatten(2), pairs], dim=2).contiguous()


def unpack_minifloats(panels: torch.Tensor, format: str, outputs: int, inputs: int) -> torch.Tensor:
    """The codes [outputs, inputs] of :func:`pack_minifloats`."""
    count, groups = panels.shape[:2]
    if format == "fp8_e4m3":
        each = panels.view(count, groups, 4, PANEL)
    else:
        nibbles, pairs = panels[:, :, : 2 * PANEL], panels[:, :, 2 * PANEL :]
        pair = nibbles.reshape(count, groups, 2, 1, PANEL)
        low = torch.cat([pair & 15, pair >> 4], dim=3).flatten(2, 3)
        each = low | torch.stack([(pairs >> 2 * i & 3) << 4 for i in range(4)], dim=2)
    return each.permute(0, 3, 1, 2).reshape(count * PANEL, groups * 4)[:outputs, :inputs]


def minifloat_linear(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, format: str
) -> torch.Tensor:
    """``x @ (scales * numbers).T`` for a weight from :func:`pack_minifloats`.

    Args:
        x: [rows, in], contiguous; float32, bfloat16 or float16.
        codes: the packed numbers.
        scales: [out], float32.
        format: a key of :data:`LARGEST`.

    Returns:
        [rows, out], dtype of ``x``; summed in float32.
    """
    result: torch.Tensor = MINIFLOAT_LINEAR.call(x, codes, scales, format)
    return result


def _reference(
    x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, format: str
) -> torch.Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    plain = unpack_minifloats(codes, format, len(scales), x.shape[1]).contiguous()
    numbers = decode_minifloat(plain, format).to(compute)
    return linear(x.to(compute), numbers * scales.to(compute)[:, None]).to(x.dtype)


def _check(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, format: str) -> None:
    _checker.floating(x, "x")
    if x.dim() != 2 or not x.is_contiguous():
        raise _checker.fail("x", f"is {list(x.shape)}", "contiguous rows")
    if format not in LARGEST:
        raise _checker.fail("format", f"is {format!r}", " or ".join(LARGEST))
    _checker.floating(scales, "scales", (torch.float32,))
    _checker.flat(scales, "scales")
    _checker.dtype(codes, "codes", torch.uint8)
    size = 4 * PANEL if format == "fp8_e4m3" else 3 * PANEL
    expected = [-(-len(scales) // PANEL), -(-x.shape[1] // 4), size]
    if list(codes.shape) != expected or not codes.is_contiguous():
        raise _checker.fail("codes", f"is {list(codes.shape)}", f"contiguous {expected}")


def _call(
    device: torch.device, dtype: torch.dtype, format: str, rows: int, outputs: int, inputs: int
) -> tuple[object, ...]:
    generator = torch.Generator().manual_seed(5)
    x = torch.randn(rows, inputs, generator=generator).to(device, dtype)
    spread = torch.exp2(torch.randint(-9, 5, (outputs, inputs), generator=generator).float())
    steps = torch.randn(outputs, inputs, generator=generator) * spread
    codes = pack_minifloats(encode_minifloat(steps, format), format).to(device)
    scales = torch.rand(outputs, generator=generator) / 4
    return x, codes, scales.to(device), format


_SIZES = ((1, 64, 64), (1, 33, 70), (9, 8, 31), (17, 40, 96), (0, 8, 8))


def _examples(device: torch.device) -> Iterator[Example]:
    for dtype in (torch.float32, *LOW_PRECISION):
        for kind in LARGEST:
            for size in _SIZES:
                label = f"{str(dtype).removeprefix('torch.')}-{kind}-{size}"
                yield Example(label, _call(device, dtype, kind, *size))


def _refusals(device: torch.device) -> Iterator[Refusal]:
    good = _call(device, torch.float32, "fp8_e4m3", 2, 40, 64)
    for label, position, value, name in (
        ("other width", 0, torch.ones(2, 60, device=device), "codes"),
        ("a vector", 0, torch.ones(64, device=device), "x"),
        ("signed codes", 1, good[1].char(), "codes"),  # type: ignore[attr-defined]
        ("low scales", 2, good[2].half(), "scales"),  # type: ignore[attr-defined]
        ("six bits", 3, "fp6_e3m2", "codes"),
        ("five bits", 3, "fp5", "format"),
    ):
        call = list(good)
        call[position] = value
        yield Refusal(label, tuple(call), name)


def _fake(x: torch.Tensor, codes: torch.Tensor, scales: torch.Tensor, format: str) -> torch.Tensor:
    return x.new_empty(len(x), len(scales))


MINIFLOAT_LINEAR = registry.define(
    Op(
        "minifloat_linear",
        "(Tensor x, Tensor codes, Tensor scales, str format) -> Tensor",
        reference=_reference,
        check=_check,
        examples=_examples,
        refusals=_refusals,
        fake=_fake,
        tolerance=Tolerance(
            {torch.float64: 1e-6, torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 2e-2},
            {torch.float64: 1e-9, torch.float32: 2e-4, torch.float16: 8e-3, torch.bfloat16: 8e-2},
        ),
        group="serving",
    )
)
