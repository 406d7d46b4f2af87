"""Small floating-point formats: E2M1, E3M0, E3M2, E4M3, E5M2, with scales.

Formats without infinities; E4M3 and E5M2 have the range of the Open Compute Project's OFP8 (448
and 57,344), so that torch's float8 types hold every value. E2M1, E3M2: OCP Microscaling Formats
(MX) 1.0, section 5.3. E3M0 and scales that are powers of two: Wu et al. 2023, "ZeroQuant-FP",
arXiv:2307.09782, section 3.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from drivetrain_compression.quantisers.integer import Noise


@dataclass(frozen=True)
class FloatFormat:
    """Numbers ``(-1)^s 2^(e - bias) 1.m`` with subnormals ``2^(1 - bias) 0.m``.

    Args:
        name: as in the literature, e.g. ``"e2m1"``.
        exponent: bits of the exponent; the bias is ``2^(exponent - 1) - 1``.
        mantissa: bits behind the point.
        largest: the largest number.
    """

    name: str
    exponent: int
    mantissa: int
    largest: float

    @property
    def bits(self) -> int:
        """Width, with the sign."""
        return 1 + self.exponent + self.mantissa

    @property
    def bias(self) -> int:
        """What is taken from the stored exponent."""
        return (1 << (self.exponent - 1)) - 1

    def round(self, values: torch.Tensor, noise: Noise = None) -> torch.Tensor:
        """The nearest numbers of the format, in the dtype of ``values``.

        Halves go to even mantissas, and where there is no mantissa to the larger number. What is
        larger than all numbers becomes the largest. NaN stays NaN.
        """
        _, exponent = torch.frexp(values)
        exponent = (exponent - 1).clamp(min=1 - self.bias) - self.mantissa
        scaled = torch.ldexp(values, -exponent)
        if noise is not None:
            scaled = scaled + noise(scaled)
        return torch.ldexp(torch.round(scaled), exponent).clamp(-self.largest, self.largest)

    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """Bit patterns of numbers of the format, uint8: sign, exponent, mantissa."""
        size = values.abs()
        _, exponent = torch.frexp(size)
        exponent = (exponent - 1).clamp(min=1 - self.bias)
        steps = torch.ldexp(size, self.mantissa - exponent).to(torch.int32)
        one = 1 << self.mantissa
        stored = torch.where(steps >= one, exponent + self.bias, 0)
        code = stored * one + steps % one
        sign = torch.signbit(values).to(torch.int32) << (self.bits - 1)
        return (code + sign).to(torch.uint8)

    def decode(self, codes: torch.Tensor, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Numbers of bit patterns."""
        codes = codes.to(torch.int32)
        one = 1 << self.mantissa
        stored = (codes >> self.mantissa) & ((1 << self.exponent) - 1)
        steps = codes % one + torch.where(stored > 0, one, 0)
        exponent = stored.clamp(min=1) - self.bias - self.mantissa
        size = torch.ldexp(steps.to(torch.float64), exponent)
        negative = (codes >> (self.bits - 1)) & 1 == 1
        return torch.where(negative, -size, size).to(dtype)


E2M1 = FloatFormat("e2m1", 2, 1, 6.0)
E3M0 = FloatFormat("e3m0", 3, 0, 16.0)
E3M2 = FloatFormat("e3m2", 3, 2, 28.0)
E4M3 = FloatFormat("e4m3", 4, 3, 448.0)
E5M2 = FloatFormat("e5m2", 5, 2, 57344.0)

FORMATS = {known.name: known for known in (E2M1, E3M0, E3M2, E4M3, E5M2)}


def float_scale(groups: torch.Tensor, format: FloatFormat) -> torch.Tensor:
    """Scale of each group, [G, 1]: ``max|w| / largest``; 1 for a group of zeros."""
    scale = groups.abs().amax(dim=-1, keepdim=True) / format.largest
    return torch.where(scale == 0, 1.0, scale)


def floating(
    groups: torch.Tensor,
    format: FloatFormat,
    scale: torch.Tensor | None = None,
    noise: Noise = None,
) -> torch.Tensor:
    """Groups [G, n] with the values that the format has, times the scale of each group."""
    scale = float_scale(groups, format) if scale is None else scale
    return format.round(groups / scale, noise) * scale


def power_of_two(scale: torch.Tensor) -> torch.Tensor:
    """Each scale, rounded up to a power of two (ZeroQuant-FP, method M1)."""
    return torch.ldexp(torch.ones_like(scale), _log2_up(scale))


def power_of_two_ratios(scale: torch.Tensor) -> torch.Tensor:
    """Scales whose ratios to the largest along dimension 0 are powers of two (method M2).

    Each is ``S_max / 2^ceil(log2(S_max / S))``, so at most as large as it was: its group's largest
    numbers saturate.
    """
    largest = scale.amax(dim=0, keepdim=True)
    return torch.ldexp(largest.expand_as(scale), -_log2_up(largest / scale))


def _log2_up(scale: torch.Tensor) -> torch.Tensor:
    mantissa, exponent = torch.frexp(scale)
    return torch.where(mantissa == 0.5, exponent - 1, exponent)
