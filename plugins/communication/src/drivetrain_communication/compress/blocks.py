"""Rows of numbers as messages of bytes: float32 scales of blocks, then codes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from drivetrain_kernels import dequantize, quantize
from torch.nn.functional import pad


@dataclass(frozen=True)
class BlockCodec:
    """Turns rows of fp32 into messages and back, with ``drivetrain_kernels``' block formats.

    A block with an infinity or NaN comes back as NaN.

    Args:
        format: int8, int4, fp8_e4m3 or fp8_e5m2.
        block: numbers that share a scale, even.
    """

    format: str
    block: int

    def padded(self, numel: int) -> int:
        """``numel`` rounded up to whole blocks."""
        return -(-numel // self.block) * self.block

    def message_bytes(self, numel: int) -> int:
        """Length of the message of ``numel`` numbers, which are padded to whole blocks."""
        whole = self.padded(numel)
        return 4 * (whole // self.block) + (whole // 2 if self.format == "int4" else whole)

    def encode(self, rows: torch.Tensor) -> torch.Tensor:
        """Messages, uint8 [k, bytes], of fp32 rows [k, n]; n is padded to whole blocks."""
        count, numel = rows.shape
        padding = self.padded(numel) - numel
        whole = pad(rows, (0, padding)) if padding else rows
        codes, scales = quantize(whole.reshape(-1), self.format, block=self.block)
        parts = [part.contiguous().view(torch.uint8).view(count, -1) for part in (scales, codes)]
        return torch.cat(parts, dim=1)

    def decode(self, messages: torch.Tensor, numel: int) -> torch.Tensor:
        """The fp32 rows [k, ``numel``] of ``messages`` [k, bytes]."""
        count, whole = len(messages), self.padded(numel)
        blocks = whole // self.block
        scales = messages[:, : 4 * blocks].reshape(-1).clone().view(torch.float32).view(-1, 1)
        codes = messages[:, 4 * blocks :].reshape(-1)
        if self.format == "int8":
            codes = codes.view(torch.int8)
        rows = dequantize(codes, scales, self.format, numel=count * whole, block=self.block)
        return rows.view(count, whole)[:, :numel]
