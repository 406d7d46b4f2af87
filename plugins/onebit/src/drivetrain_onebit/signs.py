"""Signs as bits: ``drivetrain_kernels``' operators, or the same in plain torch without them."""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch.nn.functional import pad

_HAS_KERNELS = find_spec("drivetrain_kernels") is not None


def pack_signs(values: torch.Tensor, scale: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """Pack the signs of ``values``, and write to ``error`` what ``scale * sign`` leaves out.

    Args:
        values: [n], fp32 or fp64.
        scale: one element of the same dtype.
        error: [n], of the same dtype; overwritten.

    Returns:
        uint8 [ceil(n / 8)]: eight signs a byte, least bit first; 1 from 0 on.
    """
    if _HAS_KERNELS:
        from drivetrain_kernels import pack_signs as packed_by_kernel

        return packed_by_kernel(values, scale, error)
    return pack_in_torch(values, scale, error)


def mean_signs(packed: torch.Tensor, scales: torch.Tensor, numel: int) -> torch.Tensor:
    """The fp32 mean [numel] of signs [k, bytes], each times its scale [k]; added in order."""
    if _HAS_KERNELS:
        from drivetrain_kernels import mean_signs as mean_by_kernel

        return mean_by_kernel(packed, scales, numel)
    return mean_in_torch(packed, scales, numel)


def pack_in_torch(values: torch.Tensor, scale: torch.Tensor, error: torch.Tensor) -> torch.Tensor:
    """:func:`pack_signs` without kernels."""
    signs = values >= 0
    error.copy_(values - torch.where(signs, scale, -scale))
    bits = pad(signs.to(torch.uint8), (0, -values.numel() % 8)).view(-1, 8)
    return (bits << _places(bits.device)).sum(1, dtype=torch.uint8)


def mean_in_torch(packed: torch.Tensor, scales: torch.Tensor, numel: int) -> torch.Tensor:
    """:func:`mean_signs` without kernels."""
    total = scales.new_zeros(numel)
    for row, scale in zip(packed, scales, strict=True):
        bits = (row[:, None] >> _places(row.device) & 1).view(-1)[:numel].bool()
        total += torch.where(bits, scale, -scale)
    return total / len(packed)


def _places(device: torch.device) -> torch.Tensor:
    return torch.arange(8, dtype=torch.uint8, device=device)
