"""Where the parameters of one bucket lie, and which slice of them this rank keeps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from drivetrain_zero.shards.packing import Packing

if TYPE_CHECKING:
    from drivetrain.contracts import Axis, Communicator, Handle, Tag


@dataclass(frozen=True)
class Layout:
    """A flat tensor of all parameters of a bucket, cut into one shard per rank.

    Args:
        key: of the bucket.
        packing: offsets of the parameters and length of a shard.
        shapes: of the parameters.
        dtype: of all of them.
        device: where they are used.
        communicator: gathers shards, and gives memory to gather from.
        axis: ranks that share the parameters.
    """

    key: str
    packing: Packing
    shapes: Sequence[torch.Size]
    dtype: torch.dtype
    device: torch.device
    communicator: Communicator
    axis: Axis

    def views_of(self, flat: torch.Tensor) -> list[torch.Tensor]:
        """Return every parameter's place in a flat tensor, in the parameter's shape."""
        places = zip(self.shapes, self.packing.offsets, self.packing.numels, strict=True)
        return [flat.narrow(0, offset, numel).view(shape) for shape, offset, numel in places]

    def shard_of(self, flat: torch.Tensor) -> torch.Tensor:
        """Return this rank's slice of a flat tensor."""
        length = self.packing.shard
        return flat.narrow(0, self.communicator.rank(self.axis) * length, length)

    def buffer(
        self, numel: int, dtype: torch.dtype | None = None, axis: Axis | None = None
    ) -> torch.Tensor:
        """Allocate memory [numel] for collectives; dtype and axis are those of the shards."""
        dtype = dtype or self.dtype
        if self.device.type == "meta":
            return torch.empty(numel, dtype=dtype, device=self.device)
        return self.communicator.buffer(numel, dtype, axis or self.axis)

    def joined_shards(self) -> torch.Tensor | None:
        """Allocate all shards as one row that ranks share, if they share memory. Collective."""
        on_host = self.device.type in ("cpu", "meta")  # the latter in rehearsals
        page = self.communicator.joined_page(self.axis) if on_host else 0
        if not page or self.packing.shard * self.dtype.itemsize % page:
            return None
        return self.communicator.joined_buffer(self.packing.shard, self.dtype, self.axis)

    def gather(
        self,
        whole: torch.Tensor,
        shard: torch.Tensor,
        tag: Tag,
        *,
        asynchronous: bool = False,
        settled: bool = False,
    ) -> Handle:
        """Gather the shards of all ranks into ``whole`` [numel]. Collective."""
        return self.communicator.all_gather(
            whole, shard, self.axis, tag, asynchronous=asynchronous, settled=settled
        )
