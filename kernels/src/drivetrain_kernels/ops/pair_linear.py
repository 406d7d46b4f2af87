"""Products with weights of which two of four neighbouring inputs are left (2:4)."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import linear, pad

from drivetrain_kernels.checks import LOW_PRECISION, Checker
from drivetrain_kernels.op import Example, Op, Refusal, Tolerance
from drivetrain_kernels.registry import registry

PANEL = 32
"""Outputs of one panel of a packed weight."""
INPUTS = 8
"""Inputs whose places are in one byte: two times two numbers of two bits."""

_checker = Checker("pair_linear")


def pack_pairs(weight: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The two largest of each four inputs of a weight [out, in], and where they are.

    Four values of 32 outputs lie together, of eight inputs. A byte holds their places: in the low
    four bits those of the first two, the earlier one lowest.

    Returns:
        values [ceil(out / 32), ceil(in / 8), 4, 32] in the weight's dtype, and uint8 places
        [ceil(out / 32), ceil(in / 8), 32]; what is missing is 0.
    """
    full = pad(weight, (0, -weight.shape[1] % INPUTS, 0, -len(weight) % PANEL))
    fours = full.view(len(full), -1, 4)
    # Of equal sizes the earlier ones, on every device.
    order = fours.abs().sort(dim=2, descending=True, stable=True).indices
    at = order[:, :, :2].sort(dim=2).values
    values = fours.gather(2, at).view(-1, PANEL, full.shape[1] // INPUTS, 4)
    places = at.view(-1, PANEL, full.shape[1] // INPUTS, 4)
    bits = places << (2 * torch.arange(4, device=weight.device))
    return (
        values.permute(0, 2, 3, 1).contiguous(),
        bits.sum(3).to(torch.uint8).permute(0, 2, 1).contiguous(),
    )


def unpack_pairs(
    values: torch.Tensor, places: torch.Tensor, outputs: int, inputs: int
) -> torch.Tensor:
    """The weight [outputs, inputs] of :func:`pack_pairs`, with zeros in between."""
    panels, groups = places.shape[:2]
    at = torch.stack([places >> 2 * i & 3 for i in range(4)], dim=2).long()
    full = values.new_zeros(panels, groups, 2, 4, PANEL)
    full.scatter_add_(3, at.view(panels, groups, 2, 2, PANEL), values.view_as(full[:, :, :, :2]))
    flat = full.permute(0, 4, 1, 2, 3).reshape(panels * PANEL, groups * INPUTS)
    return flat[:outputs, :inputs]


def pair_linear(
    x: torch.Tensor, values: torch.Tensor, places: torch.Tensor, outputs: int
) -> torch.Tensor:
    """``x @ weight.T`` for a weight from :func:`pack_pairs`.

    Args:
        x: [rows, in], contiguous; float32, bfloat16 or float16.
        values: of the weight, dtype of ``x``.
        places: of the values.
        outputs: out.

    Returns:
        [rows, out], dtype of ``x``; summed in float32.
    """
    result: torch.Tensor = PAIR_LINEAR.call(x, values, places, outputs)
    return result


def _reference(
    x: torch.Tensor, values: torch.Tensor, places: torch.Tensor, outputs: int
) -> torch.Tensor:
    compute = torch.promote_types(x.dtype, torch.float32)
    weight = unpack_pairs(values, places, outputs, x.shape[1])
    return linear(x.to(compute), weight.to(compute)).to(x.dtype)


def _check(x: torch.Tensor, values: torch.Tensor, places: torch.Tensor, outputs: int) -> None:
    _checker.floating(x, "x")
    if x.dim() != 2 or not x.is_contiguous():
        raise _checker.fail("x", f"is {list(x.shape)}", "contiguous rows")
    if outputs < 1:
        raise _checker.fail("outputs", f"is {outputs}", "at least 1")
    _checker.dtype(values, "values", x.dtype)
    _checker.dtype(places, "places", torch.uint8)
    panels, groups = -(-outputs // PANEL), -(-x.shape[1] // INPUTS)
    shapes = {"values": [panels, groups, 4, PANEL], "places": [panels, groups, PANEL]}
    for name, tensor in (("values", values), ("places", places)):
        if list(tensor.shape) != shapes[name] or not tensor.is_contiguous():
            raise _checker.fail(name, f"is {list(tensor.shape)}", f"contiguous {shapes[name]}")


def _call(
    device: torch.device, dtype: torch.dtype, rows: int, outputs: int, inputs: int
) -> tuple[object, ...]:
    generator = torch.Generator().manual_seed(7)
    x = torch.randn(rows, inputs, generator=generator).to(device, dtype)
    weight = torch.randn(outputs, inputs, generator=generator) / 8
    values, places = pack_pairs(weight.to(device, dtype))
    return x, values, places, outputs


_SIZES = ((1, 64, 64), (1, 33, 70), (9, 8, 31), (17, 40, 96), (0, 8, 8), (2, 1, 1))


def _examples(device: torch.device) -> Iterator[Example]:
    for dtype in (torch.float32, *LOW_PRECISION):
        for size in _SIZES:
            label = f"{str(dtype).removeprefix('torch.')}-{size}"
            yield Example(label, _call(device, dtype, *size))


def _refusals(device: torch.device) -> Iterator[Refusal]:
    good = _call(device, torch.float32, 2, 40, 64)
    for label, position, value, name in (
        ("other width", 0, torch.ones(2, 60 + 64, device=device), "values"),
        ("a vector", 0, torch.ones(64, device=device), "x"),
        ("low values", 1, good[1].half(), "values"),  # type: ignore[attr-defined]
        ("signed places", 2, good[2].char(), "places"),  # type: ignore[attr-defined]
        ("more outputs", 3, 65, "values"),
        ("no outputs", 3, 0, "outputs"),
    ):
        call = list(good)
        call[position] = value
        yield Refusal(label, tuple(call), name)


def _fake(
    x: torch.Tensor, values: torch.Tensor, places: torch.Tensor, outputs: int
) -> torch.Tensor:
    return x.new_empty(len(x), outputs)


PAIR_LINEAR = registry.define(
    Op(
        "pair_linear",
        "(Tensor x, Tensor values, Tensor places, int outputs) -> Tensor",
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
