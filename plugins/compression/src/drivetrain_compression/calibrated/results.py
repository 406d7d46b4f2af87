"""What a quantiser chose for a layer: numbers on a grid, scales, and how inputs are rounded."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from drivetrain.errors import CheckpointError, ConfigError
from drivetrain_compression.calibrated.grids import Floats, Grid, Integers, Scales, weight_of
from drivetrain_compression.quantisers.straight_through import straight_through

ACTIVATIONS: dict[str, Grid] = {"int8": Integers(8), "e4m3": Floats("e4m3")}
"""Grids that inputs may be rounded to, token by token, when they come."""


@dataclass(frozen=True)
class Rounded:
    """A weight [out, in] on a grid.

    Args:
        numbers: [out, in], in units of the scale; whole numbers on a grid of integers.
        scales: of groups.
        grid: of numbers.
        activations: a key of :data:`ACTIVATIONS`, or ``""``: inputs are not rounded.
        low_rank: factors [out, r] and [r, in] whose product is added to the weight.
        error: of the layer's output on the data, relative; ``None`` if no data was used.
        input_scale: of all inputs, known beforehand; ``None``: each token has its own.
    """

    numbers: torch.Tensor
    scales: Scales
    grid: Grid
    activations: str = ""
    low_rank: tuple[torch.Tensor, torch.Tensor] | None = None
    error: float | None = None
    input_scale: float | None = None

    def weight(self, dtype: torch.dtype) -> torch.Tensor:
        """The weight that a layer of ``dtype`` computes with."""
        whole = weight_of(self.numbers, self.scales)
        if self.low_rank is not None:
            left, right = self.low_rank
            whole = whole + left.float() @ right.float()
        return whole.to(dtype)


def stored_scale(name: str, value: object) -> float:
    """The scale of all inputs of the layer ``name``, as a file says it.

    Raises:
        CheckpointError: it is no finite number above 0.
    """
    if isinstance(value, torch.Tensor) and value.numel() == 1:
        value = value.item()
    if isinstance(value, int | float) and 0 < value < math.inf:
        return float(value)
    raise CheckpointError(f"{name}: input_scale is {value}, and has to be a finite number above 0")


def rounded_tokens(x: torch.Tensor, kind: str, known: float | None = None) -> torch.Tensor:
    """``x`` [..., in] on the grid ``kind``, in the dtype of ``x``.

    Args:
        x: tokens.
        kind: a key of :data:`ACTIVATIONS`.
        known: scale of all; by default each token has its own. What lies beyond is cut.
    """
    grid = ACTIVATIONS[kind]
    if known is not None:
        return grid.nearest(x / known) * known
    top = x.abs().amax(-1, keepdim=True)
    scale, _ = grid.ranges(-top, top)
    return grid.nearest(x / scale) * scale


class RoundedInputs:
    """A hook before a layer that rounds what comes, by place or by name."""

    def __init__(self, kind: str, known: float | None = None) -> None:
        self.kind, self.known = kind, known

    def before(self, module: nn.Linear) -> RemovableHandle:
        """Round what comes to ``module`` from now on, until the handle is removed."""
        return module.register_forward_pre_hook(self, with_kwargs=True)

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        if args:
            return (self._rounded(args[0]), *args[1:]), kwargs
        return args, {**kwargs, "input": self._rounded(kwargs["input"])}

    def _rounded(self, x: torch.Tensor) -> torch.Tensor:
        return straight_through(x, rounded_tokens(x.detach(), self.kind, self.known))


def put(module: nn.Linear, found: Rounded) -> None:
    """Give ``module`` the rounded weight, and round its inputs from now on."""
    if not torch.isfinite(found.scales.scale).all():
        raise ConfigError("scales are not finite")
    with torch.no_grad():
        module.weight.copy_(found.weight(module.weight.dtype))
    if found.activations:
        RoundedInputs(found.activations, found.input_scale).before(module)


@contextmanager
def exact_products() -> Iterator[None]:
    """Let products of float32 matrices that hold bfloat16 values use that arithmetic.

    The products are exact in it, and sums are made in float32 in any case; processors with
    bfloat16 units are several times faster so. Rounds values that do not fit bfloat16.
    """
    old = torch.backends.mkldnn.matmul.fp32_precision  # type: ignore[attr-defined]
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # type: ignore[attr-defined]
    try:
        yield
    finally:
        torch.backends.mkldnn.matmul.fp32_precision = old  # type: ignore[attr-defined]
