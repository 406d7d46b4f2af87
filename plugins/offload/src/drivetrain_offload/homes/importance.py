"""Which columns of the parameters matter most, going by their gradient."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch

from drivetrain.contracts import Segment


def important(gradient: torch.Tensor, segments: Sequence[Segment], share: float) -> torch.Tensor:
    """Elements in the columns with the largest sums of gradient magnitudes.

    A column is what has the same last index in a matrix, and the same indices but the first in a
    tensor of more dimensions; what counts is the part of it that the bucket holds. Tensors of one
    dimension are important as a whole: they are small, and have no columns.

    Args:
        gradient: of a bucket [numel].
        segments: what lies where.
        share: of a tensor's columns, rounded up.

    Returns:
        Whether each element is in such a column, bool [numel]; padding never is.
    """
    found = torch.zeros(gradient.numel(), dtype=torch.bool, device=gradient.device)
    for segment in segments:
        part = found.narrow(0, segment.offset, segment.numel)
        if len(segment.shape) < 2:
            part.fill_(True)
            continue
        width, first = math.prod(segment.shape[1:]), segment.start % math.prod(segment.shape[1:])
        sums = column_sums(gradient.narrow(0, segment.offset, segment.numel), first, width)
        # A stable order, so that ties are decided alike everywhere.
        order = sums.argsort(descending=True, stable=True)
        chosen = torch.zeros_like(sums, dtype=torch.bool)
        chosen[order[: math.ceil(share * width)]] = True
        repeats = (first + segment.numel + width - 1) // width
        part.copy_(chosen.repeat(repeats)[first : first + segment.numel])
    return found


def column_sums(part: torch.Tensor, first: int, width: int) -> torch.Tensor:
    """Sums of magnitudes by column, float32 [width].

    Args:
        part: consecutive elements of a row-major matrix.
        first: column of the first one.
        width: columns of the matrix.
    """
    sums = torch.zeros(width, dtype=torch.float32, device=part.device)
    head = min(-first % width, part.numel())
    rows = (part.numel() - head) // width
    end = head + rows * width
    sums[first : first + head] += part[:head].abs()
    sums += part[head:end].view(rows, width).abs().sum(0, dtype=torch.float32)
    sums[: part.numel() - end] += part[end:].abs()
    return sums
