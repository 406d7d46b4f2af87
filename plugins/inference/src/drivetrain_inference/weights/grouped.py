"""Weight formats over the block quantisation of ``drivetrain-kernels``: int8 and int4 in groups."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from drivetrain_kernels import dequantize, quantize, quantized_linear
from drivetrain_kernels.ops.linear import QUANTIZED_LINEAR

from drivetrain.contracts import Packed
from drivetrain.errors import ConfigError
from drivetrain_inference.weights.bound import BoundFormat, Product

_SLICE = 1 << 19
"""Elements of a weight that are unpacked at once: they stay in a processor's cache."""

GROUPS = (128, 64, 32)
"""Elements of a row that share a scale: the first that divides it."""


class _Grouped(BoundFormat):
    """Codes and parameters of ``drivetrain_kernels.quantize``; groups never cross rows."""

    code: ClassVar[str]
    symmetric: ClassVar[bool]
    few_rows: ClassVar[int]
    """Up to so many the fused product is quicker on a CPU: it unpacks for each few rows anew."""

    def tensors(self, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = shape
        packed = 2 if self.code == "int4" else 1
        dtype = torch.int8 if self.code == "int8" and self.symmetric else torch.uint8
        groups = rows * columns // self._group(columns)
        return {
            "codes": ((rows * columns // packed,), dtype),
            "parameters": ((groups, 1 if self.symmetric else 2), torch.float32),
        }

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        block = self._group(weight.shape[1])
        values = weight.detach().contiguous()
        codes, parameters = quantize(values, self.code, block=block, symmetric=self.symmetric)
        return {"codes": codes, "parameters": parameters}

    def unpack(self, packed: Packed, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        values = dequantize(
            packed["codes"],
            packed["parameters"],
            self.code,
            numel=math.prod(shape),
            block=self._group(shape[1]),
            symmetric=self.symmetric,
            dtype=dtype,
        )
        return values.view(*shape)

    def multiply(self, x: torch.Tensor, packed: Packed, outputs: int) -> torch.Tensor:
        return quantized_linear(
            x,
            packed["codes"],
            packed["parameters"],
            self.code,
            block=self._group(x.shape[1]),
            symmetric=self.symmetric,
            outputs=outputs,
        )

    def bind(self, packed: Packed, outputs: int, *, invariant: bool) -> Product:
        few = math.inf if invariant else self.few_rows
        codes, parameters = packed["codes"], packed["parameters"]
        inputs = codes.numel() * (2 if self.code == "int4" else 1) // outputs
        rest = (self.code, self._group(inputs), self.symmetric, outputs)
        function = QUANTIZED_LINEAR.function(codes.device.type)

        def product(x: torch.Tensor) -> torch.Tensor:
            if len(x) <= few or x.device.type != "cpu":
                found: torch.Tensor = function(x, codes, parameters, *rest)
                return found
            return self._multiply_many(x, packed, outputs)

        return product

    def _multiply_many(self, x: torch.Tensor, packed: Packed, outputs: int) -> torch.Tensor:
        """The product with a weight that is unpacked once, in the dtype of ``x``, by slices."""
        columns, y = x.shape[1], x.new_empty(len(x), outputs)
        sizes = {name: len(tensor) // outputs for name, tensor in packed.items()}
        step = max(1, _SLICE // columns)
        for start in range(0, outputs, step):
            stop = min(start + step, outputs)
            own = {name: t[start * sizes[name] : stop * sizes[name]] for name, t in packed.items()}
            weight = self.unpack(own, (stop - start, columns), x.dtype)
            y[:, start:stop] = torch.nn.functional.linear(x, weight)
        return y

    def _group(self, columns: int) -> int:
        for group in GROUPS:
            if columns % group == 0:
                return group
        raise ConfigError(
            f"a weight with {columns} columns cannot be cut into groups of "
            f"{', '.join(map(str, GROUPS))}; serve it without weight_format"
        )


class Int8(_Grouped):
    """8 bits and a scale a group: 8.25 bits a weight in groups of 128."""

    code, symmetric, few_rows = "int8", True, 8


class Int4(_Grouped):
    """4 bits, a scale and an offset a group: 4.5 bits a weight in groups of 128."""

    code, symmetric, few_rows = "int4", False, 16
