"""The norm of exact sums, alike on every layout.

[Note: exact norms] Squares are summed as gradients are: rounded to a multiple of a unit first. One
unit is too coarse for elements that are much smaller than the largest possible one, so what it
leaves is rounded to a finer one, and so on: each level adds without rounding, and the levels are
put together at the end, on every rank alike.

With N elements below ``2**e``, a level's sums have to stay below 2**53 units, so a level has
``52 - log2(N)`` bits; four levels reach ``2**(2 * e - 88)`` for a billion of elements.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import Axis, Purpose, Tag

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_exact.quantum import Quantum

_LEVELS = 4

_PIECE = 1 << 15
"""Elements whose squares are made at a time: they stay in a processor's cache."""


class ExactNorm:
    """A :class:`~drivetrain.contracts.state.model_states.GradientNorm` without rounded sums.

    Args:
        job: device and communicator.
        quantum: tells how large a sum may be, and learns the norm.
        elements: of this stage's parameters, trained or not; padding would depend on the layout.
    """

    def __init__(self, job: Job, quantum: Quantum, elements: int) -> None:
        self._job = job
        self._quantum = quantum
        self._elements = elements
        self._bits: int | None = None

    def __call__(
        self, counted: Mapping[int, Sequence[torch.Tensor]], over: Axis | None
    ) -> torch.Tensor:
        assert set(counted) == {1}, "rules that reduce by themselves are refused"
        gradients, exponent = counted[1], self._quantum.exponent
        assert exponent is not None
        width = 52 - self._bits_of_count()
        shifts = [
            1.5 * math.ldexp(1.0, 2 * (exponent + 1) + 52 - width * (level + 1))
            for level in range(_LEVELS)
        ]
        sums = torch.zeros(_LEVELS, dtype=torch.float64, device=self._job.device)
        for gradient in gradients:
            for piece in torch.split(gradient.view(-1), _PIECE):
                sums += _levels(piece, shifts)
        if over is not None:
            tag = Tag(Purpose.CONTROL, site="gradient norm")
            self._job.communicator.all_reduce(sums, over, tag)
        total = torch.zeros_like(sums[0])
        for level in range(_LEVELS - 1, -1, -1):  # the small ones first, in one order everywhere
            total = total + sums[level]
        norm = total.sqrt()
        self._quantum.learn(float(norm))
        return norm

    def _bits_of_count(self) -> int:
        """Digits of the number of the whole model's elements: sums grow by so many."""
        if self._bits is None:
            told = torch.tensor([self._elements], dtype=torch.int64, device=self._job.device)
            if self._job.mesh.size("pp") > 1:
                tag = Tag(Purpose.CONTROL, site="elements of the model")
                self._job.communicator.all_reduce(told, "pp", tag)
            self._bits = int(told).bit_length()
        return self._bits


def _levels(piece: torch.Tensor, shifts: Sequence[float]) -> torch.Tensor:
    rest, found = piece.double().square(), []
    for shift in shifts:
        level = rest.add(shift).sub_(shift)
        rest.sub_(level)
        found.append(level.sum())
    return torch.stack(found)
