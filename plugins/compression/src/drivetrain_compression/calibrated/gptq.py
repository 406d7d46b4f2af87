"""GPTQ (arXiv 2210.17323): round column by column, and let later columns make up for the error."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch

from drivetrain.errors import DrivetrainError
from drivetrain_compression.calibrated.grids import Grid, Scales

_DAMPINGS, _DAMPING = (0.01, 0.03, 0.1, 0.3), 0.03
"""Shares of the mean diagonal that are tried, and the one without data to try them on."""

_TRIED = 128
"""Rows that dampings are tried on."""


class SingularError(DrivetrainError):
    """A Hessian cannot be inverted, however much it is damped."""


@dataclass(frozen=True)
class Inverse:
    """What the methods need of an inverse Hessian.

    Args:
        upper: U, upper triangular, with ``U^T U = (H + damping)^-1``.
        damping: what was added to the diagonal, in units of its mean.
        dead: [in], columns that no sample touches.
    """

    upper: torch.Tensor
    damping: float
    dead: torch.Tensor


def invert(hessian: torch.Tensor, damping: float = 0.01) -> Inverse:
    """Invert ``hessian`` [in, in], damped by a share of the mean of its diagonal.

    The share is multiplied by ten as long as the matrix is not positive definite.

    Raises:
        SingularError: it is not even when the diagonal is doubled, or has NaNs.
    """
    if not torch.isfinite(hessian).all():
        raise SingularError("the Hessian has NaN or infinity: activations overflow")
    dead = hessian.diagonal() == 0
    if dead.all():
        raise SingularError("the Hessian is 0: no token of the calibration data came here")
    share = damping
    while share <= 1:
        # H = R R^T with R upper triangular is a Cholesky decomposition from the other end.
        lower, failed = torch.linalg.cholesky_ex(damped(hessian, share).flip(0, 1))
        if not failed:
            eye = torch.eye(len(hessian), dtype=hessian.dtype, device=hessian.device)
            upper = torch.linalg.solve_triangular(lower.flip(0, 1), eye, upper=True)
            return Inverse(upper, share, dead)
        share = max(share * 10, 1e-4)
    raise SingularError("the Hessian is singular, even with its diagonal doubled")


def held_damping(
    weight: torch.Tensor,
    parts: tuple[torch.Tensor, torch.Tensor] | None,
    change: Callable[[slice, torch.Tensor, float], torch.Tensor],
) -> float:
    """The damping with which outputs are off least on data that a change was not fitted to.

    Of few tokens, or of inputs with long tails, a Hessian's small directions are noise, and a
    method that inverts it follows that noise. How much damping this takes differs from 0.01 to 0.3
    between layers of one model.

    Args:
        weight: [out, in]; as rows are independent, about 128 of them are tried.
        parts: the Hessian to fit to, and that of other data; ``None``: there is no other data.
        change: makes of some rows, by a Hessian and a damping, what they become.

    Raises:
        SingularError: see :func:`invert`.
    """
    if parts is None:
        return _DAMPING
    fitted, other = parts
    rows = slice(None, None, max(1, len(weight) // _TRIED))

    def lost(share: float) -> float:
        off = change(rows, fitted, share) - weight[rows]
        return float(torch.sum(off @ other * off))

    return min(_DAMPINGS, key=lost)


def damped(hessian: torch.Tensor, share: float) -> torch.Tensor:
    """``hessian`` [in, in] with a share of the mean of its diagonal added to the diagonal.

    Columns that no sample touches get the mean, so that the diagonal is above 0.
    """
    diagonal = hessian.diagonal()
    found, mean = hessian.clone(), diagonal.mean()
    found.diagonal().add_(share * mean + (diagonal == 0) * mean)
    return found


@dataclass(frozen=True)
class Order:
    """The order in which columns are rounded.

    Args:
        columns: indices, in that order; ``None``: as they lie.
    """

    columns: torch.Tensor | None = None

    @classmethod
    def by_activity(cls, hessian: torch.Tensor) -> Order:
        """Columns with the largest activations first (``act_order``)."""
        return cls(torch.argsort(hessian.diagonal(), descending=True, stable=True))

    def of(self, tensor: torch.Tensor, *dims: int) -> torch.Tensor:
        """``tensor`` with ``dims`` in this order."""
        if self.columns is not None:
            for dim in dims:
                tensor = tensor.index_select(dim, self.columns)
        return tensor

    def back(self, tensor: torch.Tensor) -> torch.Tensor:
        """Columns [..., in] as they lie."""
        return tensor if self.columns is None else tensor[..., torch.argsort(self.columns)]


def gptq(
    weight: torch.Tensor,
    inverse: Inverse,
    grid: Grid,
    scales: Scales,
    *,
    order: Order | None = None,
    block: int = 128,
) -> torch.Tensor:
    """Numbers of the grid, in units of the scale, [out, in].

    Args:
        weight: [out, in]; rows are independent, so layers with the same inputs may be stacked.
            Zeros of a weight that is at least a quarter zeros stay zeros.
        inverse: of the Hessian in ``order``.
        grid: of numbers.
        scales: of groups of columns as they lie, so a file needs no order.
        order: of columns.
        block: columns after which the rest of the weight is updated.
    """
    order = order or Order()
    at = order.of(torch.arange(weight.shape[1], device=weight.device), 0)
    rest = order.of(weight, 1).T.contiguous()  # a column is a contiguous row
    scale, zero = (order.of(each, 1).T.contiguous() for each in scales.spread(len(at)))
    kept = _mask(weight)
    kept = None if kept is None else order.of(kept, 1).T.contiguous()
    rest[order.of(inverse.dead, 0)] = 0
    upper, numbers = inverse.upper, torch.empty_like(rest)
    for start in range(0, len(rest), block):
        stop = min(start + block, len(rest))
        errors = torch.zeros_like(rest[start:stop])
        local = upper[start:stop, start:stop]
        for i in range(stop - start):
            column = rest[start + i]
            if i:
                column = torch.addmv(column, errors[:i].T, local[:i, i], alpha=-1)
            number = grid.nearest(column / scale[start + i], zero[start + i])
            if kept is not None:
                number = number * kept[start + i]
            numbers[start + i] = number
            torch.div(column - number * scale[start + i], local[i, i], out=errors[i])
        rest[stop:].addmm_(upper[start:stop, stop:].T, errors, alpha=-1)
    return order.back(numbers.T).contiguous()


def _mask(weight: torch.Tensor) -> torch.Tensor | None:
    """Where a pruned weight is not 0; ``None`` for one that was not pruned."""
    kept = weight != 0
    pruned = kept.numel() - int(kept.sum())
    return kept.to(weight.dtype) if pruned * 4 >= kept.numel() else None
