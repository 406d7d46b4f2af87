"""The norm of gradients of any size, in one pass over them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts.world.collective import Purpose, Tag

if TYPE_CHECKING:
    from drivetrain.contracts.state.model_states import GradientNorm
    from drivetrain.contracts.world.axis import Axis
    from drivetrain.job.job import Job

_ROW = 4096
"""Elements whose squares are summed in float32; sums of rows are added up in float64."""

_PIECE = 1 << 16
"""Elements that are converted to float64 at a time."""

_TINY = 1e-15
"""Norms below this may consist of elements whose squares are too small for float32."""


class SummedNorm:
    """The default :class:`~drivetrain.contracts.state.model_states.GradientNorm`.

    Args:
        job: device and communicator.
    """

    def __init__(self, job: Job) -> None:
        self._job = job

    def __call__(
        self, counted: Mapping[int, Sequence[torch.Tensor]], over: Axis | None
    ) -> torch.Tensor:
        squares = [sum_of_squares(all_, self._job.device) * k for k, all_ in counted.items()]
        total = torch.stack(squares).sum()
        if over is not None:
            tag = Tag(Purpose.CONTROL, site="gradient norm")
            self._job.communicator.all_reduce(total, over, tag)
        return total.sqrt()


def gradient_norm(job: Job) -> GradientNorm:
    """What computes the norms of an engine's gradients in ``job``."""
    found: GradientNorm | None = job.hub.build_gradient_norm(job)
    assert found is not None, "core's default norm answers last"
    return found


def sum_of_squares(gradients: Sequence[torch.Tensor], device: torch.device) -> torch.Tensor:
    """Sum the squares of flat gradients; finite exactly if all elements are.

    Squares of float32 overflow from 2e19 on and vanish below 1e-23, so they are summed in float64.
    On a host that takes eight times as long as float32, which is therefore tried first. A device
    is not asked what came out; there float64 costs nothing, as reading the gradients takes longer.

    Args:
        gradients: floating or complex tensors.
        device: where the sum is wanted; the gradients are there, too.

    Returns:
        A 0-d float64 tensor (float32 on devices without float64), which ranks may add up.
    """
    real = [torch.view_as_real(g).view(-1) if g.is_complex() else g for g in gradients]
    if not real:
        return torch.zeros((), dtype=accumulator(device), device=device)
    if device.type != "cpu":
        dtype = accumulator(device)
        # Of torch's norms only this one converts element by element, without a copy in float64.
        norms = [torch._foreach_norm([gradient], 2, dtype=dtype)[0] for gradient in real]
        return torch.stack(norms).square().sum()
    norm = _norm(part for gradient in real for part in _row_norms(gradient))
    if not _TINY < float(norm) < float("inf"):
        pieces = (piece.double() for gradient in real for piece in torch.split(gradient, _PIECE))
        norm = _norm(torch.linalg.vector_norm(piece).view(1) for piece in pieces)
    return norm.square()


@cache
def accumulator(device: torch.device) -> torch.dtype:
    """The widest dtype that ``device`` adds up in."""
    try:
        torch.ones(1, dtype=torch.float64, device=device).sum()
    except (RuntimeError, TypeError):  # torch's ways to say that the device has no float64
        return torch.float32
    return torch.float64


def _row_norms(gradient: torch.Tensor) -> Iterator[torch.Tensor]:
    """Norms [rows] of parts of ``gradient``, in its own dtype but at least float32."""
    dtype = torch.promote_types(gradient.dtype, torch.float32)
    even = gradient.numel() // _ROW * _ROW
    if even:
        rows = gradient.narrow(0, 0, even).view(-1, _ROW)
        yield torch.linalg.vector_norm(rows, dim=1, dtype=dtype)
    rest = gradient.narrow(0, even, gradient.numel() - even)
    yield torch.linalg.vector_norm(rest, dtype=dtype).view(1)


def _norm(parts: Iterator[torch.Tensor]) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(torch.cat(list(parts)), dtype=torch.float64)
    return norm
