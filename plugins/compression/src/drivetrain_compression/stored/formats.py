"""Weight formats: numbers of a table with a scale a group, integers in groups, plain numbers.

Groups of :class:`TableFormat` are consecutive numbers in memory order; the last may be short.
"""

from __future__ import annotations

import inspect
import math
from abc import abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from drivetrain_kernels import dequantize, pair_linear, quantize, quantized_linear
from drivetrain_kernels.ops.pair_linear import INPUTS, PANEL, pack_pairs, unpack_pairs

from drivetrain.contracts import Packed, WeightFormat
from drivetrain.errors import ConfigError
from drivetrain.plan.registry import Registry
from drivetrain_compression.quantisers.floating import FORMATS

_AT_ONCE = 1 << 15
"""Numbers that are packed at once, so that what is made on the way stays small."""

_FEW_ROWS = 8
"""The fused product unpacks for each few rows anew; for more, unpacking once is quicker."""

Parts = dict[str, tuple[tuple[int, ...], torch.dtype]]


class TableFormat(WeightFormat):
    """Codes of 4, 6 or 8 bits that index a table, times a float32 scale for each group.

    The largest number of a group becomes the largest of the table.

    Args:
        group: numbers that share a scale; a multiple of 8.

    Raises:
        ConfigError: it is not.
    """

    bits: ClassVar[int]
    usual_group: ClassVar[int] = 512

    def __init__(self, group: int = 0) -> None:
        self.group = group or self.usual_group
        if self.group < 8 or self.group % 8:
            raise ConfigError(f"groups of {self.group} numbers: give a multiple of 8")

    @abstractmethod
    def table(self) -> torch.Tensor:
        """The number of each code, float32 [2^bits]."""

    @abstractmethod
    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Codes, uint8, of float32 numbers within the table's range, each to the nearest."""

    def tensors(self, shape: Sequence[int]) -> Parts:
        numel = math.prod(shape)
        codes = -(-numel // 4) * 4 if self.bits == 6 else -(-numel // 2) * 2
        return {
            "codes": ((codes * self.bits // 8,), torch.uint8),
            "scales": ((-(-numel // self.group),), torch.float32),
        }

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        flat = weight.detach().reshape(-1)
        parts = {
            name: torch.empty(shape, dtype=dtype, device=weight.device)
            for name, (shape, dtype) in self.tensors(weight.shape).items()
        }
        largest = float(self.table().abs().max())
        step = max(1, _AT_ONCE // self.group) * self.group
        for start in range(0, len(flat), step):
            piece = flat[start : start + step].float()
            count = len(piece)
            groups = torch.nn.functional.pad(piece, (0, -count % self.group)).view(-1, self.group)
            scale = groups.abs().amax(1) / largest
            scale = torch.where(scale > 0, scale, 1.0)  # a group of zeros
            codes = self.encode(groups / scale[:, None]).view(-1)[:count]
            first = start // self.group
            parts["scales"][first : first + len(scale)] = scale
            found = _pack(codes, self.bits)
            at = start * self.bits // 8
            parts["codes"][at : at + len(found)] = found
        return parts

    def unpack(self, packed: Packed, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        numel, scales = math.prod(shape), packed["scales"]
        table = self.table().to(scales.device)
        values = _look_up(packed["codes"], table, self.bits)[:numel]
        whole = numel // self.group * self.group
        values[:whole].view(-1, self.group).mul_(scales[: whole // self.group, None])
        values[whole:].mul_(scales[-1])
        return values.view(*shape).to(dtype)


def _pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Bytes, uint8, of codes: the first in the lowest bits; filled up with zeros."""
    if bits == 8:
        return torch.nn.functional.pad(codes, (0, -len(codes) % 2))
    if bits == 4:
        pairs = torch.nn.functional.pad(codes, (0, -len(codes) % 2)).view(-1, 2)
        return pairs[:, 0] | (pairs[:, 1] << 4)
    a, b, c, d = torch.nn.functional.pad(codes, (0, -len(codes) % 4)).view(-1, 4).unbind(1)
    return torch.stack([a | (b << 6), (b >> 2) | (c << 4), (c >> 4) | (d << 2)], 1).view(-1)


def _look_up(packed: torch.Tensor, table: torch.Tensor, bits: int) -> torch.Tensor:
    """Numbers of packed codes, float32 [codes]."""
    if bits == 4:  # a byte is a pair of numbers
        byte = torch.arange(256, device=table.device)
        pairs = torch.stack([table[byte & 15], table[byte >> 4]], 1)
        return pairs.index_select(0, packed.int()).view(-1)
    if bits == 6:
        a, b, c = packed.view(-1, 3).unbind(1)
        four = [a & 63, (a >> 6) | ((b & 15) << 2), (b >> 4) | ((c & 3) << 4), c >> 2]
        packed = torch.stack(four, 1).view(-1)
    return table.index_select(0, packed.int())


class _Float(TableFormat):
    """Small floating-point numbers."""

    kind: ClassVar[str]

    def table(self) -> torch.Tensor:
        known = FORMATS[self.kind]
        numbers = known.decode(torch.arange(1 << known.bits, device="cpu"))
        # Formats without infinities still have patterns that stand for no number; none is used.
        return torch.where(numbers.abs() > known.largest, 0.0, numbers)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        known = FORMATS[self.kind]
        return known.encode(known.round(values))


class E4m3(_Float):
    """FP8 with three bits of mantissa."""

    kind, bits = "e4m3", 8


class E5m2(_Float):
    """FP8 with two bits of mantissa."""

    kind, bits = "e5m2", 8


class E3m2(_Float):
    """FP6."""

    kind, bits = "e3m2", 6


class E2m1(_Float):
    """FP4."""

    kind, bits = "e2m1", 4


class Nf4(TableFormat):
    """4-bit NormalFloat: 16 quantiles of a normal distribution, exactly 0 among them.

    Dettmers et al. 2023, "QLoRA", arXiv:2305.14314, section 3: quantiles of N(0, 1), 8 for positive
    and 9 for negative numbers, divided by the largest; zero, which both have, once.
    """

    bits = 4
    usual_group = 64
    tail: ClassVar[float] = 0.9677083
    """Share below the largest quantile: mean of 1 - 1/32 and 1 - 1/30."""

    def table(self) -> torch.Tensor:
        above, below = (
            torch.special.ndtri(
                torch.linspace(self.tail, 0.5, n, dtype=torch.float64, device="cpu")
            )
            for n in (9, 8)
        )  # each ends in 0
        numbers: torch.Tensor = torch.cat([-below, above[:-1].flip(0)]) / above[0]
        return numbers.float()

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        table = self.table().to(values.device)
        between = (table[1:] + table[:-1]) / 2
        return torch.bucketize(values, between, out_int32=True).to(torch.uint8)


class Integers(WeightFormat):
    """Integers of 4 or 8 bits in groups along one dimension, with a scale and an offset or none.

    Args:
        group: numbers that share a scale; 0 for all along the dimension.
        dim: 1 for groups of inputs, 0 for groups of outputs.
        symmetric: no offset.
    """

    bits: ClassVar[int]

    def __init__(self, group: int = 64, dim: int = 1, symmetric: bool = False) -> None:
        self.group, self.dim, self.symmetric = group, dim, symmetric

    @property
    def _code(self) -> str:
        return f"int{self.bits}"

    def _block(self, shape: Sequence[int]) -> int:
        length = shape[self.dim]
        group = self.group or length
        if length % group or group % 2:
            raise ConfigError(
                f"a weight {list(shape)} is not cut into groups of {group} along dimension "
                f"{self.dim}: give an even size that divides {length} (nothing is padded)"
            )
        return group

    def tensors(self, shape: Sequence[int]) -> Parts:
        numel = math.prod(shape)
        groups = numel // self._block(shape)
        dtype = torch.int8 if self.bits == 8 and self.symmetric else torch.uint8
        return {
            "codes": ((numel * self.bits // 8,), dtype),
            "parameters": ((groups, 1 if self.symmetric else 2), torch.float32),
        }

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        block = self._block(weight.shape)
        values = weight.detach() if self.dim == 1 else weight.detach().T
        values = values.float() if values.dtype == torch.float64 else values
        codes, parameters = quantize(
            values.contiguous(), self._code, block=block, symmetric=self.symmetric
        )
        return {"codes": codes, "parameters": parameters}

    def unpack(self, packed: Packed, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        values = dequantize(
            packed["codes"],
            packed["parameters"],
            self._code,
            numel=math.prod(shape),
            block=self._block(shape),
            symmetric=self.symmetric,
            dtype=torch.float32 if dtype == torch.float64 else dtype,
        ).to(dtype)
        if self.dim == 1:
            return values.view(*shape)
        return values.view(shape[1], shape[0]).T.contiguous()

    def multiply(self, x: torch.Tensor, packed: Packed, outputs: int) -> torch.Tensor:
        if self.dim != 1 or len(x) > _FEW_ROWS or x.dtype == torch.float64:
            return super().multiply(x, packed, outputs)
        product: torch.Tensor = quantized_linear(
            x.contiguous(),
            packed["codes"],
            packed["parameters"],
            self._code,
            block=self._block((outputs, x.shape[1])),
            symmetric=self.symmetric,
            outputs=outputs,
        )
        return product


class Integers8(Integers):
    """8 bits, ``q = round((w - min) (2^8 - 1) / (max - min))``."""

    bits = 8


class Integers4(Integers):
    """4 bits, ``q = round((w - min) (2^4 - 1) / (max - min))``."""

    bits = 4


class TwoOfFour(WeightFormat):
    """Weights that were pruned 2:4: what is left, in bfloat16, and two bits for each place."""

    def tensors(self, shape: Sequence[int]) -> Parts:
        panels, groups = -(-shape[0] // PANEL), -(-shape[1] // INPUTS)
        return {
            "values": ((panels, groups, 4, PANEL), torch.bfloat16),
            "places": ((panels, groups, PANEL), torch.uint8),
        }

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        wide = weight.detach()
        values, places = pack_pairs(wide)
        if not torch.equal(unpack_pairs(values, places, *wide.shape), wide):
            raise ConfigError(
                f"a weight {list(wide.shape)} has more than two of four neighbouring inputs that "
                "are not 0: prune it first (sparsegpt or wanda with pattern 2:4)"
            )
        return {"values": values.bfloat16(), "places": places}

    def unpack(self, packed: Packed, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return unpack_pairs(packed["values"], packed["places"], shape[0], shape[1]).to(dtype)

    def multiply(self, x: torch.Tensor, packed: Packed, outputs: int) -> torch.Tensor:
        if len(x) > _FEW_ROWS or x.dtype != torch.bfloat16:
            return super().multiply(x, packed, outputs)
        product: torch.Tensor = pair_linear(
            x.contiguous(), packed["values"], packed["places"], outputs
        )
        return product


class Plain(WeightFormat):
    """The numbers themselves, for weights that are only divided among ranks.

    Args:
        dtype: of the numbers.
    """

    def __init__(self, dtype: torch.dtype = torch.bfloat16) -> None:
        self.dtype = dtype

    def tensors(self, shape: Sequence[int]) -> Parts:
        return {"values": (tuple(shape), self.dtype)}

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"values": weight.detach().to(self.dtype)}

    def unpack(self, packed: Packed, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        return packed["values"].view(*shape).to(dtype)


def format_named(name: str, **options: Any) -> WeightFormat:
    """The weight format of that name, of any installed package.

    Args:
        name: as in the group ``drivetrain.weight_formats``.
        options: arguments of its class; most have none.

    Raises:
        ConfigError: there is none, or it has no such options.
    """
    registry = Registry.installed()
    entry = registry.find("weight_formats", name)
    if entry is None:
        known = ", ".join(registry.names("weight_formats"))
        raise ConfigError(f"weight format {name!r} is not known; there are {known}")
    kind = entry.load()
    if unknown := sorted(set(options) - set(inspect.signature(kind).parameters)):
        raise ConfigError(f"weight format {name!r} cannot be told {', '.join(unknown)}")
    made: WeightFormat = kind(**options)
    return made
