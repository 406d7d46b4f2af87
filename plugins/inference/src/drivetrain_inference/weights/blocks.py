"""Weights of 8 or 4 bits whose products are sums of integers: W8A8, and blocks of GGUF."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import ClassVar

import torch
from drivetrain_kernels import block_linear
from drivetrain_kernels.ops.block_linear import (
    BLOCK_LINEAR,
    PANEL,
    decoded,
    pack_blocks,
    pack_parameters,
)

from drivetrain.contracts import Packed
from drivetrain_inference.weights.bound import BoundFormat, Product


class BlockFormat(BoundFormat):
    """Codes and float16 scales of blocks of a row; activations are rounded to 8 bits by blocks."""

    bits: ClassVar[int]
    offsets: ClassVar[bool] = False

    @abstractmethod
    def block(self, columns: int) -> int:
        """Elements of a row that share a scale."""

    @abstractmethod
    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Codes, uint8 like ``rows`` [out, blocks, block], and parameters [out, blocks, 1 or 2]."""

    def tensors(self, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = shape
        block, panels = self.block(columns), -(-rows // PANEL)
        blocks, words = -(-columns // block), block * self.bits // 32
        return {
            "codes": ((panels, blocks, words, PANEL, 4), torch.uint8),
            "parameters": ((panels, blocks, 1 + self.offsets, PANEL), torch.float16),
        }

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        columns = weight.shape[1]
        block = self.block(columns)
        full = torch.nn.functional.pad(weight.detach().float(), (0, -columns % block))
        codes, parameters = self.encode(full.view(len(weight), -1, block))
        return self.packed(codes, parameters)

    def packed(self, codes: torch.Tensor, parameters: torch.Tensor) -> dict[str, torch.Tensor]:
        """What :meth:`pack` returns, of codes [out, blocks, block] that exist already."""
        return {"codes": pack_blocks(codes, self.bits), "parameters": pack_parameters(parameters)}

    def unpack(self, packed: Packed, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        codes, parameters = packed["codes"], packed["parameters"]
        whole = decoded(codes, parameters, self.bits, shape[0], torch.float32)
        return whole.flatten(1)[:, : shape[1]].to(dtype)

    def multiply(self, x: torch.Tensor, packed: Packed, outputs: int) -> torch.Tensor:
        return block_linear(x, packed["codes"], packed["parameters"], self.bits, outputs)

    def bind(self, packed: Packed, outputs: int, *, invariant: bool) -> Product:
        codes, parameters, bits = packed["codes"], packed["parameters"], self.bits
        function = BLOCK_LINEAR.function(codes.device.type)
        return lambda x: function(x, codes, parameters, bits, outputs)


class W8A8(BlockFormat):
    """8 bits and a scale an output; activations get 8 bits and a scale a token when they come."""

    bits = 8

    def block(self, columns: int) -> int:
        return -(-columns // 4) * 4

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _symmetric(rows, 127.0, 128)


class Q80(BlockFormat):
    """GGUF's Q8_0: blocks of 32 with a scale, 8.5 bits a weight."""

    bits = 8

    def block(self, columns: int) -> int:
        return 32

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return _symmetric(rows, 127.0, 128)


class Q40(BlockFormat):
    """GGUF's Q4_0: blocks of 32 with a scale, 4.5 bits a weight."""

    bits = 4

    def block(self, columns: int) -> int:
        return 32

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        # The element that is furthest from 0 becomes -8, so that all sixteen codes are used.
        at = rows.abs().argmax(2, keepdim=True)
        scale = (rows.gather(2, at) / -8.0).half()
        codes = torch.round(rows / _divisor(scale)) + 8
        return codes.clamp(0, 15).to(torch.uint8), scale


class Q41(BlockFormat):
    """GGUF's Q4_1: blocks of 32 with a scale and an offset, 5 bits a weight."""

    bits, offsets = 4, True

    def block(self, columns: int) -> int:
        return 32

    def encode(self, rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        low = rows.amin(2, keepdim=True)
        scale = ((rows.amax(2, keepdim=True) - low) / 15).half()
        offset = low.half()
        codes = torch.round((rows - offset.float()) / _divisor(scale)).clamp(0, 15)
        return codes.to(torch.uint8), torch.cat([scale, offset], dim=2)


def _symmetric(rows: torch.Tensor, largest: float, zero: int) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (rows.abs().amax(2, keepdim=True) / largest).half()
    codes = torch.round(rows / _divisor(scale)).clamp(-largest, largest) + zero
    return codes.to(torch.uint8), scale


def _divisor(scale: torch.Tensor) -> torch.Tensor:
    """Scales as they are stored; 1 where that is 0, as all codes stand for 0 there."""
    return torch.where(scale == 0, 1.0, scale.float())
