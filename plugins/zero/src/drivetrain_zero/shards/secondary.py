"""hpZ: a second, denser shard of parameters (ZeRO++, arXiv:2306.10209, section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from drivetrain.contracts import Axis, BucketSpec, Communicator


class SecondaryShard:
    """One of ``k`` equal slices of whole parameters, kept until they are updated.

    The first gather after an update goes over all ranks and fills it; until the next update all
    others, those of backward among them, stay inside a group of ``k`` ranks.

    Args:
        communicator: gives the memory.
        axis: the ``k`` ranks, neighbours, between which whole parameters are sharded again.
        numel: elements of the whole, a multiple of ``k``.
        spec: dtype and device.
    """

    def __init__(
        self, communicator: Communicator, axis: Axis, numel: int, spec: BucketSpec
    ) -> None:
        self.axis = axis
        self.valid = False
        self._rank = communicator.rank(axis)
        length, dtype = numel // communicator.size(axis), spec.parameter_dtype
        self.shard = (
            torch.empty(length, dtype=dtype, device=spec.device)
            if spec.device.type == "meta"
            else communicator.buffer(length, dtype, axis)
        )

    def keep(self, whole: torch.Tensor) -> None:
        """Take this rank's slice of parameters that have just been gathered."""
        length = self.shard.numel()
        self.shard.copy_(whole.narrow(0, self._rank * length, length))
        self.valid = True
