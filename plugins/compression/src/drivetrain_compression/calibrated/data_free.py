"""Methods that need no data: HQQ, and low-rank terms for what rounding lost (LoRC)."""

from __future__ import annotations

from dataclasses import replace

import torch

from drivetrain_compression.calibrated.grids import Grid, Scales, fit, in_groups


def hqq(
    weight: torch.Tensor,
    grid: Grid,
    group: int,
    *,
    power: float = 0.7,
    beta: float = 10.0,
    growth: float = 1.01,
    steps: int = 20,
) -> Scales:
    """Scales by half-quadratic splitting (HQQ, Mobius Labs 2023).

    Minimises ``|W - Q(W)|^power`` for each group in two steps by turns: what is off far is taken
    out by a generalised soft threshold, and the zero point is the best one for the rest. A
    symmetric grid has no zero point, so its scale is.

    Returns:
        the scales with the least error of all steps, group by group.
    """
    current = fit(weight, grid, group)
    blocks = in_groups(weight, current.group)
    best, least = current, _error(blocks, grid, current, power)
    for _ in range(steps):
        scale, zero = current.scale[..., None], current.zero[..., None]
        numbers = grid.nearest(blocks / scale, zero)
        # In units of the scale, so that the threshold does not depend on the size of weights.
        off = _shrunk(blocks / scale - numbers, power, beta) * scale
        if grid.symmetric:
            squares = numbers.square().sum(2).clamp(min=1e-12)
            new = ((blocks - off) * numbers).sum(2) / squares
            current = replace(current, scale=torch.where(new > 0, new, current.scale))
        else:
            codes = numbers + zero
            current = replace(current, zero=(codes - (blocks - off) / scale).mean(2))
        beta *= growth
        error = _error(blocks, grid, current, power)
        better = error < least
        least = torch.where(better, error, least)
        best = replace(
            best,
            scale=torch.where(better, current.scale, best.scale),
            zero=torch.where(better, current.zero, best.zero),
        )
    return best


def low_rank(error: torch.Tensor, rank: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors [out, rank] and [rank, in] whose product is nearest to ``error`` (LoRC).

    ZeroQuant-V2 (arXiv 2303.08302, section 5): the square root of each singular value goes to
    either side.
    """
    left, values, right = torch.linalg.svd(error, full_matrices=False)
    root = values[:rank].sqrt()
    return left[:, :rank] * root, root[:, None] * right[:rank]


def _shrunk(off: torch.Tensor, power: float, beta: float) -> torch.Tensor:
    size = off.abs()
    return off.sign() * (size - size.clamp(min=1e-12).pow(power - 1) / beta).clamp(min=0)


def _error(blocks: torch.Tensor, grid: Grid, scales: Scales, power: float) -> torch.Tensor:
    scale = scales.scale[..., None]
    near = grid.nearest(blocks / scale, scales.zero[..., None]) * scale
    return (blocks - near).abs().pow(power).sum(2)
