"""Weights that are floating-point numbers of 8 or 6 bits, with a scale an output."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from drivetrain_kernels import minifloat_linear
from drivetrain_kernels.ops.minifloat_linear import (
    LARGEST,
    MINIFLOAT_LINEAR,
    PANEL,
    decode_minifloat,
    encode_minifloat,
    pack_minifloats,
    unpack_minifloats,
)

from drivetrain.contracts import Packed
from drivetrain_inference.weights.bound import BoundFormat, Product


class _Minifloat(BoundFormat):
    """The largest weight of an output becomes the format's largest number."""

    code: ClassVar[str]
    bytes_of_four: ClassVar[int]

    def tensors(self, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = shape
        panels, groups = -(-rows // PANEL), -(-columns // 4)
        return {
            "codes": ((panels, groups, PANEL * self.bytes_of_four), torch.uint8),
            "scales": ((rows,), torch.float32),
        }

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        wide = weight.detach().float()
        scales = wide.abs().amax(1) / LARGEST[self.code]
        scales = torch.where(scales == 0, 1.0, scales)
        codes = encode_minifloat(wide / scales[:, None], self.code)
        return {"codes": pack_minifloats(codes, self.code), "scales": scales}

    def unpack(self, packed: Packed, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        codes = unpack_minifloats(packed["codes"], self.code, shape[0], shape[1])
        numbers = decode_minifloat(codes.contiguous(), self.code)
        return (numbers * packed["scales"][:, None]).to(dtype)

    def multiply(self, x: torch.Tensor, packed: Packed, outputs: int) -> torch.Tensor:
        return minifloat_linear(x, packed["codes"], packed["scales"], self.code)

    def bind(self, packed: Packed, outputs: int, *, invariant: bool) -> Product:
        codes, scales, code = packed["codes"], packed["scales"], self.code
        function = MINIFLOAT_LINEAR.function(codes.device.type)
        return lambda x: function(x, codes, scales, code)


class Fp8(_Minifloat):
    """E4M3: 8 bits a weight, three bits of mantissa (arXiv 2209.05433)."""

    code, bytes_of_four = "fp8_e4m3", 4


class Fp6(_Minifloat):
    """E3M2: 6 bits a weight, two bits of mantissa (FP6-LLM, arXiv 2401.14112)."""

    code, bytes_of_four = "fp6_e3m2", 3
