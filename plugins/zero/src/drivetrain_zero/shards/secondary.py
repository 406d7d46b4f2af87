"""hpZ: a second, denser shard of parameters (ZeRO++, arXiv:2306.10209, section 3.2)."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from drivetrain.contracts import Axis, Handle, Tag
    from drivetrain_zero.shards.layout import Layout


class SecondaryShard:
    """One of ``k`` equal slices of whole parameters, kept until they are updated.

    The first gather after an update goes over all ranks and fills it; until the next update all
    others, those of backward among them, stay inside a group of ``k`` ranks.

    Args:
        layout: of the whole parameters, whose elements are a multiple of ``k``.
        axis: the ``k`` ranks, neighbours, between which whole parameters are sharded again.

    Attributes:
        is_filled: it holds what was gathered since the last update.
    """

    def __init__(self, layout: Layout, axis: Axis) -> None:
        self._communicator = layout.communicator
        self._axis = axis
        self.is_filled = False
        length = layout.packing.numel // self._communicator.size(axis)
        self.shard = layout.buffer(length, axis=axis)

    def fill(self, whole: torch.Tensor) -> None:
        """Take this rank's slice of parameters that have just been gathered."""
        length = self.shard.numel()
        self.shard.copy_(whole.narrow(0, self._communicator.rank(self._axis) * length, length))
        self.is_filled = True

    def gather(self, whole: torch.Tensor, tag: Tag, *, asynchronous: bool) -> Handle:
        """Gather the slices of ``k`` ranks into ``whole``. Collective over these."""
        return self._communicator.all_gather(
            whole, self.shard, self._axis, tag, asynchronous=asynchronous
        )
