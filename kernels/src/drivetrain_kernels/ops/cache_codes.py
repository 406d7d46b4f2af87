"""Keys and values as codes of 8 bits, each head of a token with a scale of its own."""

from __future__ import annotations

import torch

from drivetrain_kernels.checks import Checker

LARGEST = {torch.int8: 127.0, torch.uint8: 448.0}
"""The number that the largest element of a head becomes, by the dtype of codes: ``int8`` holds
integers, ``uint8`` numbers of E4M3 (arXiv 2209.05433)."""


def to_cache_codes(x: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes and scales of heads.

    Args:
        x: [..., dim].
        dtype: a key of :data:`LARGEST`.

    Returns:
        Codes [..., dim] and scales [...], float32 (float64 of float64). A head with an element that
        is not finite has the scale NaN.
    """
    compute = torch.promote_types(x.dtype, torch.float32)
    wide, largest = x.to(compute), LARGEST[dtype]
    most = wide.abs().amax(-1)
    finite = torch.isfinite(most)
    scales = torch.where(most > 1e-35, most / largest, 0.0)
    steps = wide / torch.where(scales > 0, scales, 1.0)[..., None]
    steps = torch.where((finite & (scales > 0))[..., None], steps, 0.0)
    if dtype == torch.int8:
        codes = torch.round(steps).to(torch.int8)
    else:
        near = steps.float().clamp(-largest, largest)
        codes = near.to(torch.float8_e4m3fn).view(torch.uint8)
    return codes, torch.where(finite, scales, float("nan"))


def from_cache_codes(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
    """What codes [..., dim] stand for, in the dtype of ``scales`` [...]."""
    plain = codes if codes.dtype == torch.int8 else codes.view(torch.float8_e4m3fn).float()
    return plain.to(scales.dtype) * scales[..., None]


def check_caches(
    checker: Checker,
    dtype: torch.dtype,
    caches: dict[str, torch.Tensor],
    scales: dict[str, torch.Tensor | None],
) -> None:
    """Refuse caches that are neither of ``dtype`` nor codes with scales.

    Args:
        checker: of the op.
        dtype: of queries.
        caches: keys and values [blocks, kv_heads, size, dim], by argument.
        scales: theirs [blocks, kv_heads, size], or ``None``, by argument.

    Raises:
        ArgumentError: names the argument.
    """
    kinds = {cache.dtype for cache in caches.values()}
    coded = len(kinds) == 1 and kinds <= LARGEST.keys()
    for (name, cache), (named, scale) in zip(caches.items(), scales.items(), strict=True):
        if not coded:
            checker.dtype(cache, name, dtype)
            if scale is not None:
                raise checker.fail(named, "is given", f"None, as {name} are no codes")
            continue
        if scale is None:
            raise checker.fail(named, "is None", f"scales, as {name} are codes")
        checker.floating(scale, named, (torch.float32,))
        if scale.shape != cache.shape[:3] or not scale.is_contiguous():
            expected = f"contiguous {list(cache.shape[:3])}"
            raise checker.fail(named, f"is {list(scale.shape)}", expected)
