"""Weights in the very numbers that a modifier chose, multiplied by sums of whole numbers."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from drivetrain_kernels.ops.block_linear import (
    BLOCK_LINEAR,
    MOST_BLOCK,
    PANEL,
    decoded,
    pack_blocks,
    pack_parameters,
)
from drivetrain_kernels.registry import REFERENCE

from drivetrain.contracts import Packed, WeightFormat
from drivetrain_compression.calibrated.grids import Integers, fit, round_to, stored
from drivetrain_compression.calibrated.results import Rounded, rounded_tokens

Product = Callable[[torch.Tensor], torch.Tensor]
"""[rows, in] -> [rows, out]."""

_MOST_GROUP = 128
"""Inputs of a group of 4-bit weights up to which their inputs may be rounded with one scale.

A feature that sticks out makes the others of its group coarse: where it is some hundred times as
large, rounding inputs changes the output more than rounding the weight to 4 bits did.
"""


class KeptBlocks(WeightFormat):
    """Symmetric integers of 4 or 8 bits; inputs are rounded to 8 bits by the weight's groups.

    With one group a row this is W8A8, a scale for each token; with groups it is what llama.cpp does
    with weights of 4 bits. The scale of inputs is their largest size over 127.

    On devices without a kernel for such sums nothing is gained by them: there the weight is
    unpacked, and inputs are rounded only where that is part of the model, as in W8A8.

    Args:
        bits: 4 or 8.
        group: inputs that share a scale; the last ones may be fewer.
    """

    rounds_inputs = True

    def __init__(self, bits: int, group: int) -> None:
        self.bits, self.group = bits, group

    @classmethod
    def of(cls, found: Rounded, *, rounds_inputs: bool = False) -> KeptBlocks | None:
        """The format that holds what was chosen, exactly; ``None`` if it cannot.

        Args:
            found: what was chosen.
            rounds_inputs: whether inputs may be rounded though the model does not ask for it.
        """
        grid, group, columns = found.grid, found.scales.group, found.numbers.shape[1]
        if not isinstance(grid, Integers) or not grid.symmetric or found.low_rank is not None:
            return None
        one = group == columns
        if found.activations:  # a scale for each token, so one for all of a row of weights, too
            fits = found.activations == "int8" and found.input_scale is None
            fits = fits and grid.bits == 8 and one and columns <= MOST_BLOCK
        else:
            fits = rounds_inputs and grid.bits == 4 and group <= _MOST_GROUP and group % 8 == 0
        scale = found.scales.scale
        if not fits or not torch.equal(scale.half().float(), scale.float()):
            return None
        return cls(grid.bits, group)

    def tensors(self, shape: Sequence[int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        rows, columns = shape
        panels, blocks = -(-rows // PANEL), -(-columns // self.group)
        return {
            "codes": ((panels, blocks, self._block * self.bits // 32, PANEL, 4), torch.uint8),
            "parameters": ((panels, blocks, 1, PANEL), torch.float16),
        }

    def pack(self, weight: torch.Tensor) -> dict[str, torch.Tensor]:
        wide, grid = weight.detach().float(), Integers(self.bits)
        scales = stored(fit(wide, grid, self.group), torch.float16)
        return self.packed(Rounded(round_to(wide, grid, scales), scales, grid))

    def packed(self, found: Rounded) -> dict[str, torch.Tensor]:
        """The tensors of numbers that were chosen."""
        codes = (found.numbers + (1 << (self.bits - 1))).to(torch.uint8)
        groups = found.scales.scale.shape[1]
        full = torch.nn.functional.pad(codes, (0, groups * self.group - codes.shape[1]))
        blocks = full.view(len(codes), groups, self.group)
        blocks = torch.nn.functional.pad(blocks, (0, self._block - self.group))
        return {
            "codes": pack_blocks(blocks, self.bits),
            "parameters": pack_parameters(found.scales.scale[..., None]),
        }

    def unpack(self, packed: Packed, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
        rows, columns = shape
        wide = decoded(packed["codes"], packed["parameters"], self.bits, rows, torch.float32)
        return wide[:, :, : self.group].flatten(1)[:, :columns].to(dtype)

    def multiply(self, x: torch.Tensor, packed: Packed, outputs: int) -> torch.Tensor:
        if not _has_kernel(x.device):
            x = rounded_tokens(x, "int8") if self.bits == 8 else x
            return super().multiply(x, packed, outputs)
        # Without the operator's checks, which cost as much as a small product.
        function = BLOCK_LINEAR.function(x.device.type)
        codes, parameters = packed["codes"], packed["parameters"]
        product: torch.Tensor = function(x.contiguous(), codes, parameters, self.bits, outputs)
        return product

    def joined(
        self, others: Sequence[WeightFormat], packed: Sequence[Packed], outputs: Sequence[int]
    ) -> Product | None:
        """One product with several weights, one below the other; arguments are not checked.

        Args:
            others: formats of the weights.
            packed: the weights; several are copied into one.
            outputs: of each.

        Returns:
            ``None`` if a weight has another format, or ends within a panel of 32 outputs, or the
            device has no kernel.
        """
        own = (self.bits, self.group)
        alike = [isinstance(o, KeptBlocks) and (o.bits, o.group) == own for o in others]
        if not all(alike) or any(rows % PANEL for rows in outputs[:-1]):
            return None
        first, *rest = packed
        if not _has_kernel(first["codes"].device):
            return None
        codes, parameters = first["codes"], first["parameters"]
        if rest:
            codes = torch.cat([part["codes"] for part in packed])
            parameters = torch.cat([part["parameters"] for part in packed])
        function, bits, total = BLOCK_LINEAR.function(codes.device.type), self.bits, sum(outputs)
        return lambda x: function(x, codes, parameters, bits, total)

    @property
    def _block(self) -> int:
        """Inputs of a block of codes: kernels read four at a time."""
        return -(-self.group // 4) * 4


def _has_kernel(device: torch.device) -> bool:
    return BLOCK_LINEAR.provider(device.type) != REFERENCE
