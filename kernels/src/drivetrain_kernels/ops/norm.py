"""Squared L2 norm of many tensors at once, with the overflow check that falls out of it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch

from drivetrain_kernels.checks import Checker
from drivetrain_kernels.op import Example, Op, Refusal
from drivetrain_kernels.registry import registry

_checker = Checker("norm_squared")


def norm_squared(tensors: Sequence[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Sum of the squares of all elements, and whether any element is infinite or NaN.

    Squares are summed in float64, where no finite float32 overflows: the sum is finite exactly
    when every element is. It stays a sum so that ranks can add theirs before taking the root.

    Args:
        tensors: any shapes, one device; float32, bfloat16 or float16.

    Returns:
        The sum (0-d float64) and the overflow flag (0-d bool), on the tensors' device.

    Raises:
        ArgumentError: names the argument and what was expected.
    """
    total, overflow = NORM_SQUARED.call(list(tensors))
    return total, overflow


def _reference(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    device = tensors[0].device if tensors else torch.device("cpu")
    total = torch.zeros((), dtype=torch.float64, device=device)
    for tensor in tensors:
        total += tensor.double().square().sum()
    return total, ~torch.isfinite(total)


def _check(tensors: list[torch.Tensor]) -> None:
    for index, tensor in enumerate(tensors):
        _checker.floating(tensor, f"tensors[{index}]")
        _checker.same_device(tensor, f"tensors[{index}]", tensors[0].device)


def _fake(tensors: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    anchor = tensors[0] if tensors else torch.empty(0)
    return anchor.new_empty((), dtype=torch.float64), anchor.new_empty((), dtype=torch.bool)


def _examples(device: torch.device) -> Iterator[Example]:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator).to(device)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        name = str(dtype).removeprefix("torch.")
        yield Example(f"{name}-one", ([normal(1).to(dtype)],))
        odd = [normal(7).to(dtype), normal(0).to(dtype), normal(33, 31).to(dtype)]
        yield Example(f"{name}-odd and empty", (odd,))
        yield Example(f"{name}-unaligned", ([normal(100_003).to(dtype)[1:]],))
        yield Example(f"{name}-strided", ([normal(40, 6).to(dtype).t(), normal(9).to(dtype)[::2]],))
        for value in (float("inf"), float("nan")):
            bad = normal(1000).to(dtype)
            bad[997] = value
            yield Example(f"{name}-{value}", ([normal(5).to(dtype), bad],))
    yield Example("no tensors", ([],))
    yield Example("largest float32", ([torch.full((5,), 3e38, device=device)],))
    yield Example("mixed dtypes", ([normal(9), normal(9).bfloat16(), normal(9).half()],))


def _refusals(device: torch.device) -> Iterator[Refusal]:
    ones = torch.ones(3, device=device)
    yield Refusal("integers", ([ones, ones.int()],), "tensors[1]")


NORM_SQUARED = registry.define(
    Op(
        "norm_squared",
        "(Tensor[] tensors) -> (Tensor, Tensor)",
        reference=_reference,
        check=_check,
        examples=_examples,
        refusals=_refusals,
        fake=_fake,
    )
)
