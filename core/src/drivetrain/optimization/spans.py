"""Running a rule's arithmetic over a bucket in pieces, in a dtype that is wide enough."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from dataclasses import dataclass
from functools import partial

import torch

from drivetrain.contracts.state.bucket import BucketView


@dataclass
class Span:
    """A piece of a bucket in the dtype of the arithmetic; changes are kept.

    Args:
        weights: master weights, to be updated in place.
        gradient: scaled gradient, which may be overwritten.
        states: states by name, to be updated in place.
        cut: takes this piece out of any flat tensor of the bucket.
    """

    weights: torch.Tensor
    gradient: torch.Tensor
    states: dict[str, torch.Tensor]
    cut: Callable[[torch.Tensor], torch.Tensor]


def span_size(device: torch.device) -> int:
    """Elements per span: bounds temporaries while launch overhead stays below a tenth."""
    return 1 << 20 if device.type == "cpu" else 1 << 24


def wide_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to compute in: at least fp32."""
    return torch.promote_types(dtype, torch.float32)


def is_one(scale: float | torch.Tensor) -> bool:
    """Whether a scale is known to be 1 without asking the device."""
    return isinstance(scale, (int, float)) and scale == 1


def tensors(
    bucket: BucketView, names: Collection[str], scale: float | torch.Tensor
) -> Iterator[Span]:
    """Every tensor of ``bucket`` as one span in its own shape, at least in fp32."""
    for segment in bucket.segments:
        yield from _span(bucket, names, scale, wide_dtype(bucket.weights.dtype), segment.of)


def spans(
    bucket: BucketView,
    names: Collection[str],
    scale: float | torch.Tensor,
    dtype: torch.dtype,
    size: int,
) -> Iterator[Span]:
    """Flat pieces of ``bucket`` of at most ``size`` elements, computed in ``dtype``."""
    numel = bucket.weights.numel()
    for start in range(0, numel, max(size, 1)):
        part = slice(start, min(start + size, numel))
        yield from _span(bucket, names, scale, dtype, partial(_piece, part))


def _piece(part: slice, flat: torch.Tensor) -> torch.Tensor:
    return flat if part.start == 0 and part.stop == flat.numel() else flat[part]


def _span(
    bucket: BucketView,
    names: Collection[str],
    scale: float | torch.Tensor,
    dtype: torch.dtype,
    cut: Callable[[torch.Tensor], torch.Tensor],
) -> Iterator[Span]:
    """One span; tensors of another dtype are copies, rounded back when the caller has finished."""
    stored = {name: cut(bucket.states[name]) for name in names}
    weights, gradient = cut(bucket.weights), cut(bucket.gradient).to(dtype)
    if not is_one(scale):
        gradient.mul_(scale.to(dtype) if isinstance(scale, torch.Tensor) else scale)
    states = {name: state.to(dtype) for name, state in stored.items()}
    span = Span(weights.to(dtype), gradient, states, cut)
    yield span
    for name, state in stored.items():
        if state.dtype != dtype:
            state.copy_(span.states[name])
    if weights.dtype != dtype:
        weights.copy_(span.weights)
    if bucket.out is not None:
        cut(bucket.out).copy_(span.weights)
