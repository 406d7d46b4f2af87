"""Running elementwise arithmetic over a bucket in pieces, in a dtype that is wide enough."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch

from drivetrain.update_rule import BucketView


@dataclass
class Span:
    """A piece of a bucket in the dtype of the arithmetic; changes are kept.

    Args:
        weights: master weights [n], to be updated in place.
        gradient: scaled gradient [n], which may be overwritten.
        states: states [n] by name, to be updated in place.
        part: where the piece lies in the bucket.
    """

    weights: torch.Tensor
    gradient: torch.Tensor
    states: dict[str, torch.Tensor]
    part: slice


def span_size(device: torch.device) -> int:
    """Elements per span: bounds temporaries while launch overhead stays below a tenth."""
    return 1 << 20 if device.type == "cpu" else 1 << 24


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def is_one(scale: float | torch.Tensor) -> bool:
    """Whether a scale is known to be 1 without asking the device."""
    return isinstance(scale, (int, float)) and scale == 1


def scaled(gradient: torch.Tensor, scale: float | torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """``gradient * scale`` in ``dtype``; overwrites ``gradient`` when it has that dtype."""
    gradient = gradient.to(dtype)
    return gradient if is_one(scale) else gradient.mul_(scale)


def spans(
    bucket: BucketView,
    names: Collection[str],
    scale: float | torch.Tensor,
    dtype: torch.dtype,
    size: int,
) -> Iterator[Span]:
    """Cut ``bucket`` into pieces of at most ``size`` elements, computed in ``dtype``.

    Tensors that have ``dtype`` are handed out as views, the others as copies that are rounded back
    once the caller asks for the next piece, when ``bucket.out`` is written as well.
    """
    numel = bucket.weights.numel()
    for start in range(0, numel, max(size, 1)):
        part = slice(start, min(start + size, numel))
        stored = {name: _piece(bucket.states[name], part) for name in names}
        weights = _piece(bucket.weights, part)
        span = Span(
            weights=weights.to(dtype),
            gradient=scaled(_piece(bucket.gradient, part), scale, dtype),
            states={name: state.to(dtype) for name, state in stored.items()},
            part=part,
        )
        yield span
        for name, state in stored.items():
            if state.dtype != dtype:
                state.copy_(span.states[name])
        if weights.dtype != dtype:
            weights.copy_(span.weights)
        if bucket.out is not None:
            _piece(bucket.out, part).copy_(span.weights)


def _piece(flat: torch.Tensor, part: slice) -> torch.Tensor:
    return flat if part.start == 0 and part.stop == flat.numel() else flat[part]
