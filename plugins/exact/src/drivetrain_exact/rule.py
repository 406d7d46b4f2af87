"""Updates of single elements: the same wherever a bucket is cut."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import pairwise

import torch

from drivetrain.contracts import BucketSpec, BucketView, Hyper, Segment, UpdateRule, WrappedRule
from drivetrain.errors import ConfigError

_BLOCK = 64
"""Elements that kernels compute in one loop of vectors: 2 of 512 bits in bfloat16."""

_ELEMENTS = 403
_CUTS = (0, 1, 10, 77, 256, _ELEMENTS)
_STEPS = 3


class ExactRule(WrappedRule):
    """Gives the inner rule the gradient that it would get without this package, in whole vectors.

    What is summed in float64 is multiplied by the update's scale there, and rounded once. Kernels
    compute what is left at the end of a tensor without vectors, and some round it otherwise (fused
    multiply-add). So that end is updated in a copy that is filled up to a whole block.
    """

    def update(self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor) -> None:
        if isinstance(scale, torch.Tensor):
            scale = scale.to(bucket.gradient.device)
        gradient = (bucket.gradient * scale).to(bucket.weights.dtype)
        exact = replace(bucket, gradient=gradient)
        body = gradient.numel() // _BLOCK * _BLOCK
        if body:
            self.rule.update(_part(exact, 0, body), hyper, 1.0)
        if body < gradient.numel():
            end = _part(exact, body, gradient.numel())
            filled = _filled(end)
            self.rule.update(filled, hyper, 1.0)
            for kept, new in zip(_tensors(end), _tensors(filled), strict=True):
                kept.copy_(new.narrow(0, 0, kept.numel()))


def _part(bucket: BucketView, begin: int, end: int) -> BucketView:
    """Elements [begin, end) of a bucket, in its own memory."""
    if (begin, end) == (0, bucket.weights.numel()):
        return bucket
    length = end - begin
    return replace(
        bucket,
        weights=bucket.weights.narrow(0, begin, length),
        gradient=bucket.gradient.narrow(0, begin, length),
        states={name: flat.narrow(0, begin, length) for name, flat in bucket.states.items()},
        segments=tuple(_within(bucket.segments, begin, end)),
        out=None if bucket.out is None else bucket.out.narrow(0, begin, length),
    )


def _within(segments: Sequence[Segment], begin: int, end: int) -> Iterator[Segment]:
    for segment in segments:
        low, high = max(begin, segment.offset), min(end, segment.offset + segment.numel)
        if low < high:
            start = segment.start + low - segment.offset
            yield replace(segment, start=start, numel=high - low, offset=low - begin)


def _filled(bucket: BucketView) -> BucketView:
    """A copy of less than a block, repeated up to the length of one: finite if it is."""

    def fill(flat: torch.Tensor) -> torch.Tensor:
        return flat.repeat(-(-_BLOCK // flat.numel()))[:_BLOCK]

    return replace(
        bucket,
        weights=fill(bucket.weights),
        gradient=fill(bucket.gradient),
        states={name: fill(flat) for name, flat in bucket.states.items()},
        out=None if bucket.out is None else fill(bucket.out),
    )


def _tensors(bucket: BucketView) -> list[torch.Tensor]:
    """What an update writes to."""
    written = [bucket.weights, *bucket.states.values()]
    return written if bucket.out is None else [*written, bucket.out]


def exact_rule(rule: UpdateRule, device: torch.device) -> ExactRule:
    """Return an exact rule around ``rule``, whose results do not depend on where tensors are cut.

    Whether they do is found out by running it on a tensor and on parts of it.

    Raises:
        ConfigError: they do, or the rule needs whole tensors or other ranks.
    """
    name = type(rule).__name__
    if rule.grain != "element" or rule.communicates:
        what = "communicates" if rule.communicates else "looks at whole tensors"
        raise ConfigError(
            f"exact: the optimizer {name} {what}, so its sums depend on the layout: use one that "
            "updates each element by itself (AdamW, Adam, Lion, SGD)"
        )
    generator = torch.Generator().manual_seed(0)
    drawn = torch.randn(1 + _STEPS, _ELEMENTS, generator=generator).to(device)
    exact = ExactRule(rule)
    whole = _updated(exact, drawn)
    parts = [_updated(exact, drawn[:, begin:end], begin) for begin, end in pairwise(_CUTS)]
    if not torch.equal(whole, torch.cat(parts)):
        raise ConfigError(
            f"exact: on this machine the optimizer {name} gives an element other bits where the "
            "tensor is cut elsewhere, so they depend on the layout: use another optimizer"
        )
    return exact


def _updated(rule: UpdateRule, drawn: torch.Tensor, start: int = 0) -> torch.Tensor:
    """Weights [n] after some updates; ``drawn`` [1 + steps, n] are weights and gradients."""
    weights: torch.Tensor = drawn[0].clone()
    n = weights.numel()
    segment = Segment("probe", (_ELEMENTS,), start, n, 0)
    dtype, device = weights.dtype, weights.device
    spec = BucketSpec(
        key="probe",
        numel=n,
        segments=(segment,),
        parameter_dtype=dtype,
        gradient_dtype=dtype,
        master_dtype=dtype,
        state_dtype=dtype,
        reduction=(),
        rule=rule,
        group=0,
        device=device,
    )
    declared = rule.states(spec)
    if any(state.numel is not None for state in declared):
        raise ConfigError(
            f"exact: the optimizer {type(rule).__name__} keeps states of whole buckets, which "
            "depend on the layout: use another optimizer"
        )
    states = {
        state.name: torch.full((n,), state.initial, dtype=state.dtype or dtype, device=device)
        for state in declared
    }
    for step, gradient in enumerate(drawn[1:], start=1):
        view = BucketView("probe", weights, gradient.clone(), states, (segment,), step, None, ())
        rule.update(view, {"lr": 1e-3, **rule.defaults}, 1.0)
    return weights
