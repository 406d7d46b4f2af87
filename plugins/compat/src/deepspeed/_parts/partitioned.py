"""``PartitionedTensor``: a tensor of which each rank of a group keeps one stretch."""

from __future__ import annotations

import torch
import torch.distributed as dist


class PartitionedTensor:
    """A tensor cut into stretches of equal length, the last ones shorter where it does not divide.

    Args:
        tensor: the same on every rank of the group; this rank copies its stretch.
        group: whose ranks share it.
        partition_meta: accepted; :meth:`from_meta` reads it.

    Attributes:
        local_data: this rank's stretch, flat.
        orig_size: shape of the whole.
    """

    def __init__(
        self,
        tensor: torch.Tensor,
        group: dist.ProcessGroup | None,
        partition_meta: torch.Tensor | None = None,
    ) -> None:
        self.group = group
        self.orig_size = list(tensor.shape)
        begin, end = self._borders(dist.get_rank(group))
        self.local_data = tensor.detach().reshape(-1)[begin:end].clone()

    @classmethod
    def from_meta(
        cls, meta: torch.Tensor, local_part: torch.Tensor, group: dist.ProcessGroup | None
    ) -> PartitionedTensor:
        """The same as another one, of which only what describes it and a stretch are at hand.

        Args:
            meta: of :meth:`to_meta`.
            local_part: this rank's stretch.
            group: whose ranks share it.
        """
        made = cls.__new__(cls)
        made.group, made.orig_size, made.local_data = group, meta.tolist(), local_part
        return made

    def to_meta(self) -> torch.Tensor:
        """What describes it, as a tensor that can be sent: its shape."""
        return torch.tensor(self.orig_size, dtype=torch.long, device=self.local_data.device)

    def data(self) -> torch.Tensor:
        """This rank's stretch."""
        return self.local_data

    def local_size(self) -> torch.Size:
        """Shape of this rank's stretch."""
        return self.local_data.shape

    def full_size(self) -> list[int]:
        """Shape of the whole."""
        return self.orig_size

    def full(self, device: torch.device | str | None = None) -> torch.Tensor:
        """The whole, on every rank. Collective.

        Args:
            device: where to; where the stretch is by default.
        """
        ranks = dist.get_world_size(self.group)
        begin, end = self._borders(0)
        padded = self.local_data.new_zeros(end - begin)
        padded[: self.local_data.numel()] = self.local_data
        parts = [torch.empty_like(padded) for _ in range(ranks)]
        dist.all_gather(parts, padded, group=self.group)
        whole = torch.cat(parts)[: self._elements()].view(self.orig_size)
        return whole if device is None else whole.to(device)

    def _elements(self) -> int:
        return int(torch.Size(self.orig_size).numel())

    def _borders(self, rank: int) -> tuple[int, int]:
        elements = self._elements()
        each = -(-elements // dist.get_world_size(self.group))
        return min(rank * each, elements), min((rank + 1) * each, elements)
