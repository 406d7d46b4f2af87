"""Weights as integers leave them, for training in few bits."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from drivetrain_kernels.checks import Checker
from drivetrain_kernels.op import Example, Op, Refusal
from drivetrain_kernels.registry import registry

_checker = Checker("fake_quantize")


def fake_quantize(groups: torch.Tensor, bits: int, *, symmetric: bool = True) -> torch.Tensor:
    """Round each group to 2^bits steps, and return the values that are left.

    Symmetric: ``s * clamp(round(w / s), -2^(b-1), 2^(b-1) - 1)`` with ``s = 2 max|w| / 2^b``;
    otherwise ``s * clamp(round((w - z) / s), 0, 2^b - 1) + z`` with ``s = (max - min) / 2^b`` and
    ``z = round(min / s) * s``: the formulas of DeepSpeed's compression. Ties go to even. A group of
    equal numbers keeps them (symmetric: zeros). The gradient of such a weight passes straight to
    the original, so there is no backward to compute.

    Args:
        groups: [groups, n], contiguous; float32, bfloat16 or float16. Computed in float32.
        bits: 2 to 16.
        symmetric: see above.

    Returns:
        [groups, n] in the same dtype. A NaN or infinity makes its whole group NaN.

    Raises:
        ArgumentError: names the argument and what was expected.
    """
    found: torch.Tensor = FAKE_QUANTIZE.call(groups, bits, symmetric)
    return found


def _reference(groups: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    wide = groups.to(torch.promote_types(groups.dtype, torch.float32))
    if not wide.numel():
        return groups.clone()
    if symmetric:
        scale = 2 * wide.abs().amax(1, keepdim=True) / (1 << bits)
        half = 1 << (bits - 1)
        codes = torch.round(wide / _safe(scale)).clamp(-half, half - 1)
        return (scale * codes).to(groups.dtype)
    low, high = wide.aminmax(dim=1, keepdim=True)
    scale = (high - low) / (1 << bits)
    zero = torch.where(scale == 0, low, torch.round(low / _safe(scale)) * scale)
    codes = torch.round((wide - zero) / _safe(scale)).clamp(0, (1 << bits) - 1)
    return (scale * codes + zero).to(groups.dtype)


def _safe(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale == 0, 1.0, scale)


def _check(groups: torch.Tensor, bits: int, symmetric: bool) -> None:
    _checker.floating(groups, "groups")
    if groups.dim() != 2 or not groups.is_contiguous():
        raise _checker.fail("groups", f"is {list(groups.shape)}", "contiguous [groups, n]")
    if not 2 <= bits <= 16:
        raise _checker.fail("bits", f"is {bits}", "2 to 16")


def _examples(device: torch.device) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        for bits, shape in ((2, (3, 65)), (3, (1, 7)), (4, (70, 128)), (8, (2, 5000)), (5, (0, 4))):
            values = torch.randn(shape, generator=generator).to(dtype)
            if len(values) > 1:
                values[0] = values[0].abs() + 1
                values[1, 3:] = values[1, 2]
            for symmetric in (True, False):
                kind = "symmetric" if symmetric else "asymmetric"
                yield Example(f"{name}-{kind}-{bits}-{shape}", (values.to(device), bits, symmetric))
    special = torch.zeros(2, 8)
    special[1] = -2.5
    for symmetric in (True, False):
        yield Example(f"zeros, constants-{symmetric}", (special.to(device), 4, symmetric))


def _refusals(device: torch.device) -> Iterator[Refusal]:
    ones = torch.ones(2, 8, device=device)
    yield Refusal("one bit", (ones, 1, True), "bits")
    yield Refusal("a vector", (ones[0], 4, True), "groups")
    yield Refusal("turned", (ones.T, 4, True), "groups")
    yield Refusal("integers", (ones.int(), 4, True), "groups")


FAKE_QUANTIZE = registry.define(
    Op(
        "fake_quantize",
        "(Tensor groups, int bits, bool symmetric) -> Tensor",
        reference=_reference,
        check=_check,
        examples=_examples,
        refusals=_refusals,
        fake=lambda groups, bits, symmetric: torch.empty_like(groups),
    )
)
