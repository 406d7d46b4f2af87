"""What one pass over the columns leaves on the table: numbers chosen again, and scales fitted.

GPTQ and SparseGPT choose each column once, when they do not know yet what later columns will be off
by. Coordinate descent goes over all columns again (QuantEase, arXiv 2309.01885; COMQ, arXiv
2403.07134): each becomes the best one for what all others are now, so the error never grows. With
the numbers chosen, the best scales are a small least-squares problem for each row.

The error is ``sum(off H off^T)`` with ``off`` [out, in] what a weight is off by, for the H that
:func:`drivetrain_compression.calibrated.gptq.damped` returns, as in the first pass.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch

from drivetrain_compression.calibrated.grids import Floats, Grid, Scales, in_groups, weight_of

Choose = Callable[[int, torch.Tensor], torch.Tensor]
"""Given a column's index and its best values [out], the values that it may have."""

_ENTRIES = 1 << 22
"""Of the matrices of all rows' scales that are in memory at once."""

_RIDGE = 1e-6
"""Share of the diagonal by which scales are held where the numbers say nothing of them."""


def descend(
    weight: torch.Tensor,
    current: torch.Tensor,
    hessian: torch.Tensor,
    choose: Choose,
    *,
    block: int = 128,
) -> torch.Tensor:
    """One pass of coordinate descent over the columns of ``current`` [out, in].

    Args:
        weight: [out, in], what is to be met.
        current: what it has become.
        hessian: [in, in], damped, with a diagonal above 0.
        choose: makes a column from the best values that it could have, one by one.
        block: columns after which the rest is told of what has changed.
    """
    new = current.T.contiguous()  # a column is a contiguous row
    slopes = (hessian @ (current - weight).T).contiguous()  # [in, out]: half of the gradient
    diagonal = hessian.diagonal()
    for start in range(0, len(new), block):
        stop = min(start + block, len(new))
        local, moved = hessian[start:stop, start:stop], torch.zeros_like(new[start:stop])
        for i in range(stop - start):
            at = start + i
            slope = slopes[at]
            if i:
                slope = torch.addmv(slope, moved[:i].T, local[:i, i])
            column = choose(at, new[at] - slope / diagonal[at])
            torch.sub(column, new[at], out=moved[i])
            new[at] = column
        slopes[stop:].addmm_(hessian[stop:, start:stop], moved)
    return new.T.contiguous()


def refit(
    weight: torch.Tensor,
    numbers: torch.Tensor,
    hessian: torch.Tensor,
    scales: Scales,
    dtype: torch.dtype,
) -> Scales:
    """The best scales for numbers [out, in] that are chosen, as a file has them in ``dtype``.

    A row whose error would not fall, or a scale of which would not be positive, keeps its own.
    """
    many = max(1, _ENTRIES // scales.scale.shape[1] ** 2)
    parts = [slice(at, at + many) for at in range(0, len(weight), many)]
    found = [
        _refit_rows(weight[at], numbers[at], scales.scale[at], hessian, scales.group, dtype)
        for at in parts
    ]
    return replace(scales, scale=torch.cat(found))


def _refit_rows(
    weight: torch.Tensor,
    numbers: torch.Tensor,
    scale: torch.Tensor,
    hessian: torch.Tensor,
    size: int,
    dtype: torch.dtype,
) -> torch.Tensor:
    """Scales [out, groups] that make the error least, or those there are."""
    columns = numbers.shape[1]

    def off(scale: torch.Tensor) -> torch.Tensor:
        return weight_of(numbers, Scales(scale, scale, size)) - weight

    def by_group(values: torch.Tensor) -> torch.Tensor:
        return in_groups(values, size).sum(2)

    before = off(scale)
    slope = before @ hessian
    normal = torch.stack(
        [
            by_group((numbers[:, near] @ hessian[near]) * numbers)
            for near in (slice(at, min(at + size, columns)) for at in range(0, columns, size))
        ],
        1,
    )
    ridge = _RIDGE * normal.diagonal(dim1=1, dim2=2) + torch.finfo(scale.dtype).tiny
    lower, failed = torch.linalg.cholesky_ex(normal + torch.diag_embed(ridge))
    step = torch.cholesky_solve(by_group(slope * numbers)[..., None], lower)[..., 0]
    new = scale - step
    good = (failed == 0) & (torch.isfinite(new) & (new > 0)).all(1)
    new = torch.where(good[:, None], new, scale).to(dtype).to(scale.dtype)
    after = off(new)
    better = ((after @ hessian) * after).sum(1) < (slope * before).sum(1)
    return torch.where(better[:, None] & (new > 0), new, scale)


def refine(
    weight: torch.Tensor,
    numbers: torch.Tensor,
    hessian: torch.Tensor,
    grid: Grid,
    scales: Scales,
    dtype: torch.dtype,
    *,
    sweeps: int,
    block: int = 128,
) -> tuple[torch.Tensor, Scales]:
    """Fit scales and choose numbers again, ``sweeps`` times.

    Args:
        weight: [out, in]; where it is 0 and so is the number, that stays so.
        numbers: [out, in], of a first pass.
        hessian: damped.
        grid: of numbers. Scales that have to be powers of two stay as they are.
        scales: of the numbers, as they are stored.
        dtype: that files have scales in.
        sweeps: how often.
        block: see :func:`descend`.
    """
    fixed = isinstance(grid, Floats) and bool(grid.powers)
    free = ((weight != 0) | (numbers != 0)).to(weight.dtype)
    for _ in range(sweeps):
        if not fixed:
            scales = refit(weight, numbers, hessian, scales, dtype)
        scale, zero = (each.T.contiguous() for each in scales.spread(weight.shape[1]))
        chosen = torch.empty_like(scale)

        def choose(
            at: int,
            values: torch.Tensor,
            scale: torch.Tensor = scale,
            zero: torch.Tensor = zero,
            chosen: torch.Tensor = chosen,
        ) -> torch.Tensor:
            number = grid.nearest(values / scale[at], zero[at]) * free[:, at]
            chosen[at] = number
            return number * scale[at]

        descend(weight, weight_of(numbers, scales), hessian, choose, block=block)
        numbers = chosen.T.contiguous()
    return numbers, scales


def settle(
    weight: torch.Tensor, pruned: torch.Tensor, hessian: torch.Tensor, *, sweeps: int
) -> torch.Tensor:
    """What is left of a pruned weight [out, in], moved to where the output is off least."""
    kept = (pruned != 0).to(pruned.dtype).T.contiguous()
    for _ in range(sweeps):
        pruned = descend(weight, pruned, hessian, lambda at, values: values * kept[at])
    return pruned
