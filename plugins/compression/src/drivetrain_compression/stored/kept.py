"""Weights in the very numbers that a modifier chose, packed, for layers that compute with them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from drivetrain_kernels import quantized_linear

from drivetrain.contracts import Packed, WeightFormat
from drivetrain_compression.calibrated.grids import Floats, Grid, Integers, Scales, fit, round_to
from drivetrain_compression.calibrated.results import Rounded, rounded_tokens
from drivetrain_compression.files.packing import pack_words, unpack_words
from drivetrain_compression.stored.kept_blocks import KeptBlocks

_FEW_ROWS = 8
"""The fused product unpacks for each few rows anew; for more, unpacking once is quicker."""

Parts = dict[str, tuple[tuple[int, ...], torch.dtype]]


class Kept(WeightFormat):
    """Numbers of a grid and scales of groups of inputs, as files of compressed models have them.

    Args:
        grid: of numbers.
        group: inputs that share a scale; the last ones may be fewer.
        activations: how inputs are rounded in :meth:`multiply`; ``""``: they are not.
        input_scale: of all inputs; ``None``: each token has its own.
        rank: of a term that is added to the weight; 0: there is none.
        scale_dtype: of scales and that term.
    """

    def __init__(
        self,
        grid: Grid,
        group: int,
        activations: str = "",
        *,
        rank: int = 0,
        input_scale: float | None = None,
        scale_dtype: torch.dtype = torch.float32,
    ) -> None:
        self.grid, self.group, self.activations = grid, group, activations
        self.rank, self.input_scale, self.scale_dtype = rank, input_scale, scale_dtype

    @property
    def rounds_inputs(self) -> bool:
        """Whether :meth:`multiply` does."""
        return bool(self.activations)

    def tensors(self, shape: Sequence[int]) -> Parts:
        rows, columns = shape
        groups, scale = -(-columns // self.group), torch.float32
        found: Parts = {"scale": ((rows, groups), self.scale_dtype)}
        if self._fused(columns):
            per = 8 // self.grid.bits
            kind = torch.int8 if self.grid.bits == 8 else torch.uint8
            found = {"codes": ((rows * columns // per,), kind), "scale": ((rows, groups), scale)}
        else:
            words = -(-columns * self.grid.bits // 32)
            found["codes"] = ((rows, words), torch.int32)
        if not self.grid.symmetric:
            found["zero"] = ((rows, groups), torch.float32)
        if self.rank:
            found["left"] = ((rows, self.rank), self.scale_dtype)
            found["right"] = ((self.rank, columns), self.scale_dtype)
        return found

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        """Numbers nearest to a weight, without a low-rank term's help."""
        wide = weight.detach().float()
        scales = fit(wide, self.grid, self.group)
        found = Rounded(round_to(wide, self.grid, scales), scales, self.grid)
        if self.rank:
            left, right = (
                wide.new_zeros(s) for s in ((len(wide), self.rank), (self.rank, wide.shape[1]))
            )
            found = Rounded(found.numbers, scales, self.grid, low_rank=(left, right))
        return self.packed(found)

    def packed(self, found: Rounded) -> dict[str, torch.Tensor]:
        """The tensors of numbers that were chosen."""
        columns, grid = found.numbers.shape[1], self.grid
        made = {"scale": found.scales.scale.to(self.scale_dtype)}
        if isinstance(grid, Floats):
            codes = grid.format.encode(found.numbers).to(torch.int64)
            low = 0
        else:
            assert isinstance(grid, Integers)
            codes = (found.numbers + found.scales.spread(columns)[1]).round().to(torch.int64)
            low = grid.low
        if self._fused(columns):
            made = {"codes": _for_kernels(codes, grid.bits), "scale": found.scales.scale.float()}
        else:
            made["codes"] = pack_words(codes - low, grid.bits)
        if not grid.symmetric:
            made["zero"] = found.scales.zero.float()
        if found.low_rank is not None:
            made["left"], made["right"] = (part.to(self.scale_dtype) for part in found.low_rank)
        return made

    def unpack(self, packed: Packed, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        rows, columns = shape
        scale, grid = packed["scale"].float(), self.grid
        zero = torch.zeros_like(scale) if grid.symmetric else packed["zero"]
        scales = Scales(scale, zero, self.group)
        if self._fused(columns):
            numbers = _from_kernels(packed["codes"], grid.bits).view(rows, columns).float()
        else:
            codes = unpack_words(packed["codes"], grid.bits, columns)
            if isinstance(grid, Floats):
                numbers = grid.format.decode(codes)
            else:
                assert isinstance(grid, Integers)
                numbers = codes.float() + grid.low - scales.spread(columns)[1]
        rest = (packed["left"], packed["right"]) if self.rank else None
        return Rounded(numbers, scales, grid, low_rank=rest).weight(dtype)

    def multiply(self, x: torch.Tensor, packed: Packed, outputs: int) -> torch.Tensor:
        if self.activations:
            x = rounded_tokens(x, self.activations, self.input_scale)
        columns = x.shape[1]
        if not self._fused(columns) or self.rank or len(x) > _FEW_ROWS or x.dtype == torch.float64:
            return super().multiply(x, packed, outputs)
        product: torch.Tensor = quantized_linear(
            x.contiguous(),
            packed["codes"],
            packed["scale"].view(-1, 1),
            f"int{self.grid.bits}",
            block=self.group,
            symmetric=True,
            outputs=outputs,
        )
        return product

    def _fused(self, columns: int) -> bool:
        """Whether kernels multiply with such codes as they are."""
        fits = isinstance(self.grid, Integers) and self.grid.symmetric and self.grid.bits in (4, 8)
        return fits and columns % self.group == 0 and self.group % 2 == 0


def kept(
    found: Rounded, scale_dtype: torch.dtype, *, rounds_inputs: bool = False
) -> Kept | KeptBlocks:
    """The format that holds exactly what was chosen.

    One whose products are sums of whole numbers where inputs are rounded and it can, as those are
    quicker.

    Args:
        found: what was chosen.
        scale_dtype: that scales were chosen in.
        rounds_inputs: whether inputs may be rounded though the model does not ask for it.
    """
    if (blocks := KeptBlocks.of(found, rounds_inputs=rounds_inputs)) is not None:
        return blocks
    rank = 0 if found.low_rank is None else found.low_rank[0].shape[1]
    scales = found.scales
    return Kept(
        found.grid, scales.group, found.activations,
        rank=rank, input_scale=found.input_scale, scale_dtype=scale_dtype,
    )  # fmt: skip


def _for_kernels(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Signed codes as ``drivetrain_kernels.quantize`` lays them out."""
    flat = codes.reshape(-1)
    if bits == 8:
        return flat.to(torch.int8)
    low = (flat & 15).to(torch.uint8).view(-1, 2)
    return low[:, 0] | (low[:, 1] << 4)


def _from_kernels(codes: torch.Tensor, bits: int) -> torch.Tensor:
    if bits == 8:
        return codes
    wide = torch.stack([codes & 15, codes >> 4], 1).view(-1).to(torch.int8)
    return torch.where(wide >= 8, wide - 16, wide)
