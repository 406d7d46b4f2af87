"""How outer gradients travel."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch

from drivetrain_communication.compress.blocks import BlockCodec


class Codec(Protocol):
    """Turns rows of numbers into messages of bytes and back."""

    def padded(self, numel: int) -> int:
        """``numel`` rounded up to what a message can have."""

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Messages, uint8 [k, bytes], of rows [k, n]; n is a padded length."""

    def decode(self, messages: torch.Tensor, numel: int) -> torch.Tensor:
        """The rows [k, ``numel``] of ``messages`` [k, bytes], fp32 or wider."""


@dataclass(frozen=True)
class AsTheyAre:
    """Numbers of a plain dtype.

    Args:
        dtype: that they travel in.
    """

    dtype: torch.dtype

    def padded(self, numel: int) -> int:
        return numel

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        return rows.to(self.dtype).contiguous().view(torch.uint8)

    def decode(self, messages: torch.Tensor, numel: int) -> torch.Tensor:
        rows = messages.clone().view(self.dtype)[:, :numel]
        return rows if self.dtype == torch.float64 else rows.float()


def codec(method: str, block: int, dtype: torch.dtype) -> Codec:
    """The codec of ``diloco.outer_gradients`` for numbers that are kept in ``dtype``."""
    if method == "fp32":
        return AsTheyAre(dtype)
    if method == "bf16":
        return AsTheyAre(torch.bfloat16)
    return BlockCodec(method, block)
