"""PowerSGD: sums of matrices of low rank (Vogels et al. 2019, https://arxiv.org/abs/1905.13727)."""

from __future__ import annotations

import zlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from drivetrain.contracts import Collective, Communicator, Handle, Kind
from drivetrain_communication.compress.errors import Errors, finite
from drivetrain_communication.compress.handles import then


@dataclass(frozen=True)
class Matrix:
    """Where a matrix lies in a flat bucket.

    Args:
        offset: its first element.
        rows: its first dimension.
        columns: the product of the others.
    """

    offset: int
    rows: int
    columns: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """The matrix, a view."""
        return flat.narrow(0, self.offset, self.rows * self.columns).view(self.rows, self.columns)


class PowerSGD:
    """All-reduce of a bucket whose matrices travel as products of two thin ones (algorithm 2).

    One step of the power iteration from the last result, with error feedback: all ranks add up
    ``P = (M + E) Q``, make its columns orthonormal, and add up ``Q = (M + E)' P``; the sum is
    ``P Q'``, and E is what is left. What is no matrix, or not larger than its factors, travels
    with P as it is.

    Args:
        rank: columns of P and Q.
        matrices: key of a bucket -> the matrices in it; grows as engines are built.
        errors: keeps E, and Q from step to step.
    """

    kinds = frozenset({Kind.ALL_REDUCE})

    def __init__(self, rank: int, matrices: Mapping[str, Sequence[Matrix]], errors: Errors) -> None:
        self._rank = rank
        self._matrices = matrices
        self._errors = errors

    def sent_bytes(self, collective: Collective, size: int) -> int:
        """Bytes of both factors and of what travels as it is; without matrices, all of it."""
        numel = collective.output.numel()
        found = self._worthwhile(collective)
        small = sum(self._rank * (m.rows + m.columns) for m in found)
        return 4 * (small + numel - sum(m.rows * m.columns for m in found))

    def _worthwhile(self, collective: Collective) -> list[Matrix]:
        known = self._matrices.get(collective.tag.key, ())
        end = max((m.offset + m.rows * m.columns for m in known), default=0)
        if end > collective.output.numel():
            return []
        return [m for m in known if self._rank * (m.rows + m.columns) < m.rows * m.columns]

    def run(self, collective: Collective, inner: Communicator, name: str) -> Handle:
        """Carry out ``collective`` over ``inner``; ``name`` is its tensor's."""
        c, matrices = collective, self._worthwhile(collective)
        flat = c.output.view(-1)
        error = self._errors.of(f"{name}, worker", tuple(flat.shape), flat.device)
        wanted = flat.float() + error
        widths = [self._rank * m.columns for m in matrices]
        state = f"{name}, factors"
        fresh = self._errors.is_new(state)
        factors = self._errors.of(state, (sum(widths),), flat.device)
        if fresh:
            factors.copy_(_drawn(name, sum(widths)))
        right = [
            factor.view(m.columns, -1)
            for factor, m in zip(torch.split(factors, widths), matrices, strict=True)
        ]
        rest = _rest(wanted, matrices)
        thin = [m.of(wanted) @ q for m, q in zip(matrices, right, strict=True)]
        first = torch.cat([p.reshape(-1) for p in thin] + [rest])
        inner.all_reduce(first, c.axis, c.tag)
        lengths = [p.numel() for p in thin]
        *sums, rest = torch.split(first, [*lengths, len(rest)])
        left = [_orthonormal(p.view(m.rows, -1)) for p, m in zip(sums, matrices, strict=True)]
        second = torch.cat(
            [(m.of(wanted).T @ p).reshape(-1) for m, p in zip(matrices, left, strict=True)]
        )
        own = second.clone()
        handle = inner.all_reduce(second, c.axis, c.tag, asynchronous=c.asynchronous)

        def finish() -> None:
            """The sum, and what this rank has not sent of its own term."""
            total = _with_rest(wanted, matrices, rest)
            parts = zip(
                matrices,
                left,
                torch.split(second, widths),
                torch.split(own, widths),
                strict=True,
            )
            for m, p, q, q_own in parts:
                torch.matmul(p, q.view(m.columns, -1).T, out=m.of(total))
                m.of(wanted).sub_(p @ q_own.view(m.columns, -1).T)
            _forget_rest(wanted, matrices)
            error.copy_(finite(wanted))
            factors.copy_(finite(second))
            flat.copy_(total)

        return then(handle, finish, asynchronous=c.asynchronous)


def _drawn(name: str, numel: int) -> torch.Tensor:
    """Normal numbers [numel], the same on all ranks and in all runs."""
    generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
    return torch.randn(numel, generator=generator)


def _orthonormal(matrix: torch.Tensor) -> torch.Tensor:
    """Orthonormal columns that span those of ``matrix``; NaN where that is not finite."""
    if not bool(torch.isfinite(matrix).all()):
        return torch.full_like(matrix, float("nan"))
    columns: torch.Tensor = torch.linalg.qr(matrix)[0]
    return columns


def _gaps(numel: int, matrices: Sequence[Matrix]) -> list[slice]:
    """What lies between matrices in a flat tensor."""
    gaps, at = [], 0
    for m in sorted(matrices, key=lambda m: m.offset):
        gaps.append(slice(at, m.offset))
        at = m.offset + m.rows * m.columns
    return [*gaps, slice(at, numel)]


def _rest(flat: torch.Tensor, matrices: Sequence[Matrix]) -> torch.Tensor:
    return torch.cat([flat[gap] for gap in _gaps(len(flat), matrices)])


def _with_rest(like: torch.Tensor, matrices: Sequence[Matrix], rest: torch.Tensor) -> torch.Tensor:
    total, at = torch.empty_like(like), 0
    for gap in _gaps(len(like), matrices):
        length = gap.stop - gap.start
        total[gap] = rest[at : at + length]
        at += length
    return total


def _forget_rest(flat: torch.Tensor, matrices: Sequence[Matrix]) -> None:
    for gap in _gaps(len(flat), matrices):
        flat[gap] = 0.0
