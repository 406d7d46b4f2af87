"""Room in host memory for blocks of sequences that had to give way."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from drivetrain_inference.cache.paged import PagedCache


@dataclass(frozen=True)
class Away:
    """Where a sequence's blocks lie in host memory.

    Args:
        slots: of the host's blocks, in the order of the sequence.
        length: tokens in them.
    """

    slots: tuple[int, ...]
    length: int


class HostBlocks:
    """Copies of blocks in host memory, page-locked where the device is another one.

    Args:
        cache: whose blocks they are.
        number: how many there is room for.
    """

    def __init__(self, cache: PagedCache, number: int) -> None:
        self._cache = cache
        self._tensors = [
            torch.empty(
                number, *each.shape[1:], dtype=each.dtype, pin_memory=each.device.type == "cuda"
            )
            for each in cache.tensors
        ]
        self._free = list(range(number))

    @property
    def free(self) -> int:
        """Blocks that there is room for."""
        return len(self._free)

    def save(self, blocks: Sequence[int], length: int) -> Away | None:
        """Copy blocks here; ``None`` if there is no room for all of them."""
        if not blocks or len(blocks) > len(self._free):
            return None
        slots = [self._free.pop() for _ in blocks]
        for host, device in self._pairs():
            host[slots] = device[list(blocks)].to("cpu")
        return Away(tuple(slots), length)

    def restore(self, away: Away, blocks: Sequence[int]) -> None:
        """Copy them into as many of the cache's blocks, and forget them here."""
        slots = list(away.slots)
        for host, device in self._pairs():
            device[list(blocks)] = host[slots].to(device.device)
        self.drop(away)

    def drop(self, away: Away) -> None:
        """Forget them."""
        self._free.extend(away.slots)

    def _pairs(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        return list(zip(self._tensors, self._cache.tensors, strict=True))
