"""Numbers of a cut model beside those of the whole one."""

from __future__ import annotations

import torch

_TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.float16: 2e-2, torch.bfloat16: 1e-1}
"""Largest difference, as a part of the largest number, by dtype: sums in another order."""


def difference(name: str, whole: torch.Tensor, found: torch.Tensor) -> str | None:
    """How ``found`` differs from ``whole``, or ``None``; sums in another order do not count.

    Args:
        name: of what returned them, for the text.
        whole: expected numbers.
        found: numbers to compare.
    """
    if whole.shape != found.shape:
        return f"{name} returns shape {tuple(found.shape)} in place of {tuple(whole.shape)}"
    if not whole.is_floating_point() or not whole.numel():
        return None
    both = whole.isfinite() & found.isfinite()
    scale = whole[both].abs().max().item() if bool(both.any()) else 0.0
    if bool((whole.isfinite() != found.isfinite()).any()):
        return f"{name} returns other infinite or undefined numbers"
    largest = (whole - found)[both].abs().max().item() if bool(both.any()) else 0.0
    if largest > _TOLERANCES.get(whole.dtype, 1e-1) * max(scale, 1e-3):
        return f"{name} returns numbers that differ by {largest:.2g}, where they go to {scale:.2g}"
    return None
