"""Grids that weights are rounded to: integers or small floats times a scale for each group."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace

import torch

from drivetrain.errors import ConfigError
from drivetrain_compression.quantisers.floating import (
    FORMATS,
    FloatFormat,
    power_of_two,
    power_of_two_ratios,
)


class Grid(ABC):
    """Numbers that a weight divided by its scale may have.

    Attributes:
        bits: of one code.
        symmetric: whether there is no zero point.
    """

    bits: int
    symmetric: bool = True

    @abstractmethod
    def ranges(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Scales and zero points that cover [low, high], tensors of one shape."""

    @abstractmethod
    def nearest(self, values: torch.Tensor, zero: torch.Tensor | float = 0.0) -> torch.Tensor:
        """The numbers nearest to ``values``, which are in units of the scale."""


@dataclass(frozen=True)
class Integers(Grid):
    """Codes from -2^(b-1) to 2^(b-1) - 1, and a zero point among them unless symmetric.

    Raises:
        ConfigError: fewer than 2 bits, or more than 8.
    """

    bits: int = 4
    symmetric: bool = True

    def __post_init__(self) -> None:
        if not 2 <= self.bits <= 8:
            raise ConfigError(f"bits must be from 2 to 8 for integers, got {self.bits}")

    @property
    def low(self) -> int:
        """The smallest code."""
        return -(1 << (self.bits - 1))

    @property
    def high(self) -> int:
        """The largest code."""
        return (1 << (self.bits - 1)) - 1

    def ranges(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.symmetric:
            # Half a step beyond the largest code: all codes are used, and the largest weight is
            # off by at most half a step like every other.
            scale = _positive(torch.maximum(low.abs(), high.abs()) / (2 ** (self.bits - 1) - 0.5))
            return scale, torch.zeros_like(scale)
        low, high = low.clamp(max=0), high.clamp(min=0)  # so that 0 is a number of the grid
        scale = _positive((high - low) / (2**self.bits - 1))
        return scale, (self.low - torch.round(low / scale)).clamp(self.low, self.high)

    def nearest(self, values: torch.Tensor, zero: torch.Tensor | float = 0.0) -> torch.Tensor:
        return torch.round(values + zero).clamp(self.low, self.high) - zero


@dataclass(frozen=True)
class Floats(Grid):
    """Small floats, by name: ``e2m1``, ``e3m0``, ``e3m2``, ``e4m3``, ``e5m2``.

    Args:
        name: of the format.
        powers: whether scales are powers of two: ``""``, ``"m1"`` (each is rounded up) or ``"m2"``
            (the ratio to the row's largest is; ZeroQuant-FP, section 3).
    """

    name: str
    powers: str = ""

    def __post_init__(self) -> None:
        if self.name not in FORMATS:
            raise ConfigError(f"format {self.name!r} is not known; there are {', '.join(FORMATS)}")
        if self.powers not in ("", "m1", "m2"):
            raise ConfigError(f"powers is {self.powers!r}, expected '', 'm1' or 'm2'")

    @property
    def format(self) -> FloatFormat:
        """The numbers."""
        return FORMATS[self.name]

    @property
    def bits(self) -> int:  # type: ignore[override]
        """Of one code, its sign included."""
        return self.format.bits

    def ranges(self, low: torch.Tensor, high: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        scale = _positive(torch.maximum(low.abs(), high.abs()) / self.format.largest)
        if self.powers == "m1":
            scale = power_of_two(scale)
        elif self.powers == "m2":
            scale = power_of_two_ratios(scale.T).T.contiguous()
        return scale, torch.zeros_like(scale)

    def nearest(self, values: torch.Tensor, zero: torch.Tensor | float = 0.0) -> torch.Tensor:
        return self.format.round(values)


@dataclass(frozen=True)
class Scales:
    """Scales of a weight's groups.

    Args:
        scale: [out, groups], positive.
        zero: [out, groups], the code that stands for 0; between two codes if HQQ found it so.
        group: columns of a group; the last one may be shorter.
    """

    scale: torch.Tensor
    zero: torch.Tensor
    group: int

    def column(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of column ``index``, each [out]."""
        group = index // self.group
        return self.scale[:, group], self.zero[:, group]

    def spread(self, columns: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Scale and zero of every weight, each [out, columns]."""
        at = torch.arange(columns, device=self.scale.device) // self.group
        return self.scale[:, at], self.zero[:, at]


def fit(weight: torch.Tensor, grid: Grid, group: int = 0) -> Scales:
    """Scales with which the grid covers all of each group.

    Args:
        weight: [out, in].
        grid: of numbers.
        group: columns that share a scale; 0: a row does.
    """
    columns = weight.shape[1]
    group = min(group, columns) or columns
    blocks = in_groups(weight, group, float("nan"))
    low = torch.nan_to_num(blocks, nan=float("inf")).amin(2)
    high = torch.nan_to_num(blocks, nan=float("-inf")).amax(2)
    scale, zero = grid.ranges(low, high)
    return Scales(scale, zero, group)


def in_groups(weight: torch.Tensor, group: int, fill: float = 0.0) -> torch.Tensor:
    """[out, groups, group] of [out, in]; the last group is filled up."""
    full = torch.nn.functional.pad(weight, (0, -weight.shape[1] % group), value=fill)
    return full.view(len(weight), -1, group)


def round_to(weight: torch.Tensor, grid: Grid, scales: Scales) -> torch.Tensor:
    """Numbers of the grid, in units of the scale, nearest to a weight [out, in]."""
    scale, zero = scales.spread(weight.shape[1])
    return grid.nearest(weight / scale, zero)


def weight_of(numbers: torch.Tensor, scales: Scales) -> torch.Tensor:
    """The weight that numbers [out, in] stand for."""
    return numbers * scales.spread(numbers.shape[1])[0]


def fit_by_error(
    weight: torch.Tensor,
    grid: Grid,
    group: int,
    hessian: torch.Tensor | None = None,
    *,
    shrink: float = 0.5,
    steps: int = 20,
) -> Scales:
    """Scales of ranges that are cut so that the group's output, on the data, changes least.

    The error of a group's row is ``d H d^T`` with the group's block of ``hessian``, or the sum of
    squares without one. AWQ (arXiv 2306.00978) calls it clipping.
    """
    whole = fit(weight, grid, group)
    blocks = in_groups(weight, whole.group)
    grams = None if hessian is None else _diagonal_blocks(hessian, whole.group)
    best: Scales | None = None
    least = torch.full_like(whole.scale, float("inf"))
    for step in range(steps):
        ratio = 1 - (1 - shrink) * step / steps
        scale, zero = _cut(blocks, grid, whole, ratio)
        error = blocks - grid.nearest(blocks / scale[..., None], zero[..., None]) * scale[..., None]
        loss = _loss(error, grams)
        if best is None:
            best, least = Scales(scale, zero, whole.group), loss
            continue
        better = loss < least
        least = torch.where(better, loss, least)
        best = Scales(
            torch.where(better, scale, best.scale),
            torch.where(better, zero, best.zero),
            whole.group,
        )
    assert best is not None
    return best


def _cut(
    blocks: torch.Tensor, grid: Grid, whole: Scales, ratio: float
) -> tuple[torch.Tensor, torch.Tensor]:
    if grid.symmetric and not getattr(grid, "powers", ""):
        return whole.scale * ratio, whole.zero
    return grid.ranges(blocks.amin(2) * ratio, blocks.amax(2) * ratio)


def _loss(error: torch.Tensor, grams: torch.Tensor | None) -> torch.Tensor:
    if grams is None:
        return error.square().sum(2)
    return torch.einsum("ogi,gij->ogj", error, grams).mul_(error).sum(2)


def _diagonal_blocks(hessian: torch.Tensor, group: int) -> torch.Tensor:
    full = torch.nn.functional.pad(hessian, (0, -len(hessian) % group, 0, -len(hessian) % group))
    count = len(full) // group
    blocks = full.view(count, group, count, group)
    return torch.stack([blocks[i, :, i] for i in range(count)])


def _positive(scale: torch.Tensor) -> torch.Tensor:
    return torch.where(scale > 0, scale, torch.ones_like(scale))  # a group of zeros


def stored(scales: Scales, dtype: torch.dtype) -> Scales:
    """Scales as a file has them, so that weights are rounded to what is read again."""
    return replace(scales, scale=_positive(scales.scale.to(dtype).to(scales.scale.dtype)))
