"""Blocks of numbers as small integers with one scale each: what travels instead of floats.

The arithmetic is ``drivetrain_kernels``', which is used where it is installed; without it the same
is done here in plain torch, slower. It works in float32, so bfloat16 beyond float16's range
survives, and a block with an infinity or NaN comes back as NaN.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from typing import Literal, NamedTuple

import torch
from torch.nn.functional import pad

BLOCK = 256
"""Numbers that share a scale; float32 scales are then 1.6 % of int8 messages, 3.1 % of int4."""

_ALIGNMENT = 16
_LARGEST = {"int8": 127, "int4": 7}
_SMALLEST_RANGE = 2.0**-100
"""Blocks of still smaller numbers count as zeros: the inverse of their scale would overflow."""


@dataclass(frozen=True)
class BlockCodec:
    """Turns vectors into *messages* of bytes and back: float32 scales, then codes.

    The error of a number is at most half a step: ``max|block| / 254`` for int8, ``/ 14`` for int4,
    with symmetric codes rounded to nearest.

    Args:
        format: bits of a code.
    """

    format: Literal["int8", "int4"]

    def message_bytes(self, numel: int) -> int:
        """Length of the message of ``numel`` numbers, a multiple of 16."""
        length = 4 * -(-numel // BLOCK) + self._code_bytes(numel)
        return -(-length // _ALIGNMENT) * _ALIGNMENT

    def shrinks(self, values: torch.Tensor) -> bool:
        """Whether ``values`` can be encoded, and are smaller then."""
        encodes = values.dtype in (torch.float32, torch.bfloat16, torch.float16)
        return encodes and self.message_bytes(values.numel()) < values.nbytes

    def encode(self, values: torch.Tensor, message: torch.Tensor) -> None:
        """Write flat ``values`` [n] into ``message``, uint8 [message_bytes(n)]."""
        codes, scales = _kernels().quantize(values, self.format)
        place = self._parts(message, values.numel())
        place[0].copy_(scales.view(torch.uint8).view(-1))
        place[1].copy_(codes.view(torch.uint8))

    def decode(
        self, message: torch.Tensor, numel: int, dtype: torch.dtype = torch.float32
    ) -> torch.Tensor:
        """The ``numel`` numbers of a message, flat, in ``dtype``."""
        scales, codes = self._parts(message, numel)
        return _kernels().dequantize(codes, scales.view(torch.float32), self.format, numel, dtype)

    def rounded(self, values: torch.Tensor) -> torch.Tensor:
        """What arrives of ``values`` [n], in their dtype."""
        message = values.new_empty(self.message_bytes(values.numel()), dtype=torch.uint8)
        self.encode(values, message)
        return self.decode(message, values.numel(), values.dtype)

    def sum(self, messages: torch.Tensor, numel: int) -> torch.Tensor:
        """Float32 sum [numel] of ``messages`` [k, bytes], added in order."""
        total = self.decode(messages[0], numel)
        for message in messages[1:]:
            total += self.decode(message, numel)
        return total

    def _parts(self, message: torch.Tensor, numel: int) -> tuple[torch.Tensor, torch.Tensor]:
        scales = 4 * -(-numel // BLOCK)
        return message.narrow(0, 0, scales), message.narrow(0, scales, self._code_bytes(numel))

    def _code_bytes(self, numel: int) -> int:
        return numel if self.format == "int8" else -(-numel // 2)


class _Kernels(NamedTuple):
    """The two operations on one vector: codes, as they are stored, and scales [blocks]."""

    quantize: Callable[[torch.Tensor, str], tuple[torch.Tensor, torch.Tensor]]
    dequantize: Callable[[torch.Tensor, torch.Tensor, str, int, torch.dtype], torch.Tensor]


@cache
def _kernels() -> _Kernels:
    if find_spec("drivetrain_kernels") is None:
        return _Kernels(quantize_in_torch, dequantize_in_torch)
    from drivetrain_kernels import dequantize, quantize

    def dequantize_flat(
        codes: torch.Tensor, scales: torch.Tensor, format: str, numel: int, dtype: torch.dtype
    ) -> torch.Tensor:
        if format == "int8":
            codes = codes.view(torch.int8)
        parameters = scales.view(-1, 1)
        return dequantize(codes, parameters, format, numel=numel, block=BLOCK, dtype=dtype)

    def quantize_flat(values: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
        return quantize(values, format, block=BLOCK)

    return _Kernels(quantize_flat, dequantize_flat)


def quantize_in_torch(values: torch.Tensor, format: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of flat ``values``; two int4 codes to a byte, the first in the low bits."""
    numel, largest = values.numel(), _LARGEST[format]
    grid = pad(values.float(), (0, -numel % BLOCK)).view(-1, BLOCK)
    extent = grid.abs().amax(1, keepdim=True)
    broken = ~torch.isfinite(extent)
    scales = torch.where(extent < _SMALLEST_RANGE, 1.0, extent / largest)
    steps = (grid * (1.0 / scales)).masked_fill(broken | (extent < _SMALLEST_RANGE), 0.0)
    codes = steps.round().clamp(-largest, largest).to(torch.int8).view(-1)[:numel]
    if format == "int4":
        pairs = pad(codes.view(torch.uint8) & 0xF, (0, numel % 2)).view(-1, 2)
        codes = pairs[:, 0] | (pairs[:, 1] << 4)
    return codes, scales.masked_fill(broken, float("nan")).view(-1)


def dequantize_in_torch(
    codes: torch.Tensor, scales: torch.Tensor, format: str, numel: int, dtype: torch.dtype
) -> torch.Tensor:
    """The inverse of :func:`quantize_in_torch`, for codes given as bytes."""
    steps = codes.view(torch.int8)
    if format == "int4":
        # Shifted left and back again, the sign bit of the low half is spread over the high one.
        steps = torch.stack([(steps << 4) >> 4, steps >> 4], 1).view(-1)[:numel]
    grid = pad(steps.float(), (0, -numel % BLOCK)).view(-1, BLOCK)
    return (grid * scales.view(-1, 1)).view(-1)[:numel].to(dtype)
