"""Integers of 1 to 16 bits with scales: symmetric, asymmetric, ternary, binary.

Each function takes groups [G, n] in any floating dtype and returns them with the values that are
left, in the same dtype. ``scale_*`` and ``*_codes`` are the parts, for who stores integers.

The formulas are those of DeepSpeed's compression: a step is ``range / 2^b``, not ``/ (2^b - 1)``.
A group of equal numbers has no range; it keeps its values where formulas would divide by zero.

Ternary: Li et al. 2016, "Ternary Weight Networks", arXiv:1605.04711, section 2.2.
Binary: Rastegari et al. 2016, "XNOR-Net", arXiv:1603.05279, section 3.1.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from drivetrain_kernels import fake_quantize

from drivetrain.errors import ConfigError

MOST_BITS = 16

Noise = Callable[[torch.Tensor], torch.Tensor] | None
"""Makes numbers of the shape of its argument, uniform in [-0.5, 0.5), for stochastic rounding;
``None`` rounds to the nearest, and halves to even."""


def check_bits(bits: int, label: str, least: int = 1) -> None:
    """Refuse numbers of bits that no format has.

    Raises:
        ConfigError: out of range.
    """
    if not least <= bits <= MOST_BITS:
        raise ConfigError(f"{label}: {bits} bits; there are formats of {least} to {MOST_BITS}")


def _round(values: torch.Tensor, noise: Noise) -> torch.Tensor:
    return torch.round(values if noise is None else values + noise(values))


def _safe(scale: torch.Tensor) -> torch.Tensor:
    """Return ``scale`` with 1 in place of 0: what it divides is 0 then, too."""
    return torch.where(scale == 0, 1.0, scale)


def _fake(groups: torch.Tensor, bits: int, symmetric: bool) -> torch.Tensor:
    # A slice or a transposed tensor stays a view in reshape, and kernels take plain memory.
    flat = groups.detach().reshape(-1, groups.shape[-1]).contiguous()
    return fake_quantize(flat, bits, symmetric=symmetric).view(groups.shape)


def symmetric_scale(groups: torch.Tensor, bits: int) -> torch.Tensor:
    """The step of each group, [G, 1]: ``2 max|w| / 2^bits``."""
    return 2 * groups.abs().amax(dim=-1, keepdim=True) / (1 << bits)


def symmetric_codes(
    groups: torch.Tensor, scale: torch.Tensor, bits: int, noise: Noise = None
) -> torch.Tensor:
    """Integers in [-2^(bits-1), 2^(bits-1) - 1], in the dtype of ``groups``."""
    half = 1 << (bits - 1)
    return _round(groups / _safe(scale), noise).clamp(-half, half - 1)


def symmetric(groups: torch.Tensor, bits: int, noise: Noise = None) -> torch.Tensor:
    """``s * clamp(round(w / s), -2^(b-1), 2^(b-1) - 1)`` with ``s = 2 max|w| / 2^b``."""
    if noise is None and bits > 1:
        return _fake(groups, bits, True)
    scale = symmetric_scale(groups, bits)
    return scale * symmetric_codes(groups, scale, bits, noise)


def symmetric_static(
    values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int, noise: Noise = None
) -> torch.Tensor:
    """:func:`symmetric` with a range that is known: ``max(|low|, high)`` in place of ``max|w|``."""
    scale = 2 * torch.maximum(low.abs(), high) / (1 << bits)
    return scale * symmetric_codes(values, scale, bits, noise)


def asymmetric_scale(groups: torch.Tensor, bits: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Step and zero point of each group, [G, 1] each: ``(max - min) / 2^bits``, on a grid point."""
    low, high = groups.aminmax(dim=-1, keepdim=True)
    return _asymmetric_scale(low, high, bits)


def _asymmetric_scale(
    low: torch.Tensor, high: torch.Tensor, bits: int
) -> tuple[torch.Tensor, torch.Tensor]:
    scale = (high - low) / (1 << bits)
    zero = torch.round(low / _safe(scale)) * scale
    return scale, torch.where(scale == 0, low, zero)


def asymmetric_codes(
    groups: torch.Tensor, scale: torch.Tensor, zero: torch.Tensor, bits: int, noise: Noise = None
) -> torch.Tensor:
    """Integers in [0, 2^bits - 1], in the dtype of ``groups``."""
    return _round((groups - zero) / _safe(scale), noise).clamp(0, (1 << bits) - 1)


def asymmetric(groups: torch.Tensor, bits: int, noise: Noise = None) -> torch.Tensor:
    """``s * clamp(round((w - z) / s), 0, 2^b - 1) + z`` with ``z = round(min / s) * s``."""
    if noise is None and bits > 1:
        return _fake(groups, bits, False)
    scale, zero = asymmetric_scale(groups, bits)
    return scale * asymmetric_codes(groups, scale, zero, bits, noise) + zero


def asymmetric_static(
    values: torch.Tensor, low: torch.Tensor, high: torch.Tensor, bits: int, noise: Noise = None
) -> torch.Tensor:
    """:func:`asymmetric` with a range that is known."""
    scale, zero = _asymmetric_scale(low, high, bits)
    return scale * asymmetric_codes(values, scale, zero, bits, noise) + zero


def ternary(groups: torch.Tensor) -> torch.Tensor:
    """``alpha sign(w)`` where ``|w| > t``, else 0; ``t = 0.7 mean|w|``, ``alpha`` their mean."""
    size = groups.abs()
    kept = size > 0.7 * size.mean(dim=-1, keepdim=True)
    count = kept.sum(dim=-1, keepdim=True).clamp(min=1)
    alpha = torch.where(kept, size, 0.0).sum(dim=-1, keepdim=True) / count
    return torch.where(kept, alpha * groups.sign(), 0.0)


def binary(groups: torch.Tensor) -> torch.Tensor:
    """``mean|w| sign(w)``; zeros stay zero."""
    return groups.abs().mean(dim=-1, keepdim=True) * groups.sign()
