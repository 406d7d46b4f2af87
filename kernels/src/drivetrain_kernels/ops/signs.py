"""One bit per element: signs packed into bytes, and means of what several ranks have packed."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch.nn.functional import pad

from drivetrain_kernels.checks import Checker
from drivetrain_kernels.op import Example, Op, Refusal
from drivetrain_kernels.registry import registry

_pack = Checker("pack_signs")
_mean = Checker("mean_signs")
_FLOAT32 = (torch.float32,)


def pack_signs(values: torch.Tensor, scale: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """Pack the signs of ``values``, and write to ``error`` what ``scale * sign`` leaves out.

    The compression of 1-bit Adam (arXiv:2102.02888) with error feedback, in one pass.

    Args:
        values: float32 [n].
        scale: float32, one element, from 0 on.
        error: float32 [n], overwritten.

    Returns:
        uint8 [ceil(n / 8)]: eight signs a byte, least bit first; 1 from 0 on (and -0), 0 below it
        and for NaN. Bits after the last element are 0.

    Raises:
        ArgumentError: names the argument and what was expected.
    """
    packed: torch.Tensor = PACK_SIGNS.call(values, scale, error)
    return packed


def mean_signs(packed: torch.Tensor, scales: torch.Tensor, numel: int) -> torch.Tensor:
    """Mean of k vectors of signs, each multiplied by its scale; added in order.

    Args:
        packed: uint8 [k, ceil(n / 8)], rows as from :func:`pack_signs`.
        scales: float32 [k].
        numel: n.

    Returns:
        float32 [n].

    Raises:
        ArgumentError: names the argument and what was expected.
    """
    mean: torch.Tensor = MEAN_SIGNS.call(packed, scales, numel)
    return mean


def _pack_reference(values: torch.Tensor, scale: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    signs, size = values >= 0, scale.reshape(())
    error.copy_(values - torch.where(signs, size, -size))
    bits = pad(signs.to(torch.uint8), (0, -values.numel() % 8)).view(-1, 8)
    return (bits << torch.arange(8, dtype=torch.uint8, device=bits.device)).sum(
        1, dtype=torch.uint8
    )


def _mean_reference(packed: torch.Tensor, scales: torch.Tensor, numel: int) -> torch.Tensor:
    places = torch.arange(8, dtype=torch.uint8, device=packed.device)
    total = torch.zeros(numel, dtype=scales.dtype, device=packed.device)
    for row, scale in zip(packed, scales, strict=True):
        bits = (row[:, None] >> places & 1).view(-1)[:numel].bool()
        total = total + torch.where(bits, scale, -scale)
    return total / len(packed)


def _pack_check(values: torch.Tensor, scale: torch.Tensor, error: torch.Tensor) -> None:
    for name, tensor in (("values", values), ("error", error)):
        _pack.flat(tensor, name)
        _pack.floating(tensor, name, _FLOAT32)
    _pack.dtype(error, "error", values.dtype)
    _pack.dtype(scale, "scale", values.dtype)
    _pack.numel(scale, "scale", 1, "one for all values")
    _pack.numel(error, "error", values.numel(), "as many as values")
    for name, tensor in (("scale", scale), ("error", error)):
        _pack.same_device(tensor, name, values.device)


def _mean_check(packed: torch.Tensor, scales: torch.Tensor, numel: int) -> None:
    _mean.dtype(packed, "packed", torch.uint8)
    if packed.dim() != 2 or not len(packed) or not packed.is_contiguous():
        shape = f"has shape {tuple(packed.shape)}"
        raise _mean.fail("packed", shape, "contiguous [sources, bytes], not empty")
    _mean.floating(scales, "scales", _FLOAT32)
    _mean.flat(scales, "scales")
    _mean.numel(scales, "scales", len(packed), "one for each source")
    _mean.same_device(scales, "scales", packed.device)
    if packed.shape[1] != -(-numel // 8):
        raise _mean.fail("numel", f"is {numel}", f"as many as {packed.shape[1]} bytes hold")


# -- examples -------------------------------------------------------------------------------------


def _pack_examples(device: torch.device) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)
    for numel in (0, 1, 7, 8, 9, 64, 1001, 70_001):
        values = torch.randn(numel, generator=generator)
        special = torch.tensor([0.0, -0.0, 1e-40, -1e-40, 3e38, -3e38, float("inf")])
        values[3 : 3 + len(special)] = special[: max(numel - 3, 0)]
        call = (values.to(device), torch.tensor(0.7, device=device), torch.ones_like(values))
        yield Example(str(numel), (*call[:2], call[2].to(device)))
    grid = torch.randn(101, generator=generator).to(device)
    ones = torch.ones(100, device=device)
    yield Example("unaligned", (grid[1:], torch.tensor([2.5], device=device), ones))


def _mean_examples(device: torch.device) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)
    for sources, numel in ((1, 0), (1, 9), (2, 64), (3, 1001), (5, 13), (4, 70_001)):
        packed = torch.randint(0, 256, (sources, -(-numel // 8)), generator=generator)
        scales = torch.rand(sources, generator=generator)
        call = (packed.to(device, torch.uint8), scales.to(device), numel)
        yield Example(f"{sources} of {numel}", call)


def _pack_refusals(device: torch.device) -> Iterator[Refusal]:
    ones, one = torch.ones(8, device=device), torch.ones(1, device=device)
    yield Refusal("half values", (ones.half(), one, ones), "values")
    yield Refusal("other length", (ones, one, torch.ones(7, device=device)), "error")
    yield Refusal("a scale each", (ones, ones, torch.ones(8, device=device)), "scale")


def _mean_refusals(device: torch.device) -> Iterator[Refusal]:
    packed, scales = torch.zeros(2, 1, dtype=torch.uint8), torch.ones(2)
    packed, scales = packed.to(device), scales.to(device)
    yield Refusal("signed bytes", (packed.to(torch.int8), scales, 8), "packed")
    yield Refusal("no sources", (packed[0], scales, 8), "packed")
    yield Refusal("one scale", (packed, scales[:1], 8), "scales")
    yield Refusal("more elements", (packed, scales, 9), "numel")


PACK_SIGNS = registry.define(
    Op(
        "pack_signs",
        "(Tensor values, Tensor scale, Tensor(a!) error) -> Tensor",
        reference=_pack_reference,
        check=_pack_check,
        examples=_pack_examples,
        refusals=_pack_refusals,
        fake=lambda values, scale, error: values.new_empty(
            -(-values.numel() // 8), dtype=torch.uint8
        ),
    )
)
MEAN_SIGNS = registry.define(
    Op(
        "mean_signs",
        "(Tensor packed, Tensor scales, int numel) -> Tensor",
        reference=_mean_reference,
        check=_mean_check,
        examples=_mean_examples,
        refusals=_mean_refusals,
        fake=lambda packed, scales, numel: scales.new_empty(numel),
    )
)
