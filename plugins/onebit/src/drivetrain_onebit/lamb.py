"""1-bit LAMB as an update rule."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import BucketView, Communicator, Hyper, Segment, StateSpec
from drivetrain.optimization.checks import check_non_negative
from drivetrain.optimization.spans import Span, tensors, wide_dtype
from drivetrain_onebit.rule import OneBitRule, stays_zero

if TYPE_CHECKING:
    from drivetrain.contracts import BucketSpec

_STATES = ("exp_avg", "exp_avg_sq", "exp_avg_sq_fresh")
_TRUST, _FACTOR, _SCALING = range(3)
"""What each row of the state ``lamb`` [tensors, 3] holds: the trust ratio (averaged during the
warm-up, then frozen), by what it was multiplied last, and what the tensor's momentum is multiplied
by before it is compressed. 0 is a number that is not known yet."""


class OneBitLamb(OneBitRule):
    """1-bit LAMB (Li et al. 2021, https://arxiv.org/abs/2104.06069, algorithm 1).

    During the first ``freeze_step`` updates it is LAMB without bias correction, on gradients that
    are reduced as usual; a moving average of each tensor's trust ratio is kept. After that, second
    moment and trust ratios are frozen, and momenta are averaged with one bit per element:

    - Tensors share a message and its one scale. So each tensor's momentum is multiplied before, by
      the mean of the tensors' root mean squares over its own when they were frozen, and divided
      after.
    - The averaged momentum tells the averaged gradient, ``(m - beta1 m_before) / (1 - beta1)``,
      with which a fresh second moment goes on. The largest ratio of the roots, frozen over fresh,
      (weakened as far as weight decay makes up the update) multiplies the frozen trust ratio. It
      stays within ``factor_min`` and ``factor_max``, and changes by at most ``factor_threshold``
      of itself per update.

    A trust ratio belongs to the layout that the rank had. Where that has changed, it is that of the
    first update, as LAMB would take it then, and the factor begins with 1.

    Args:
        communicator: carries the signs; over the axes that a bucket's gradients are summed over.
        lr: learning rate.
        betas: decay of both moments.
        eps: added to the roots of the second moments.
        weight_decay: decoupled decay, part of the update whose norm is taken.
        freeze_step: updates of the warm-up, from 1 on.
        max_coeff: largest trust ratio.
        min_coeff: smallest trust ratio.
        coeff_beta: decay of the averaged trust ratio.
        factor_max: largest factor.
        factor_min: smallest factor.
        factor_threshold: largest relative change of the factor in one update.
        bias_correction: must be false, as the algorithm has none.
        eps_inside_sqrt: must be false.
        max_grad_norm: must be 0; ``gradient_clipping`` clips.
        cuda_aware: accepted, has no effect.
        comm_backend_name: accepted, has no effect; the job's communicator is used.

    Raises:
        ValueError: a value is out of range.
    """

    grain = "tensor"

    def __init__(
        self,
        communicator: Communicator,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        freeze_step: int = 100_000,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        coeff_beta: float = 0.9,
        factor_max: float = 4.0,
        factor_min: float = 0.5,
        factor_threshold: float = 0.1,
        bias_correction: bool = False,
        eps_inside_sqrt: bool = False,
        max_grad_norm: float = 0.0,
        cuda_aware: bool = False,
        comm_backend_name: str = "nccl",
    ) -> None:
        super().__init__(communicator, lr, betas, eps, weight_decay, freeze_step=freeze_step)
        if bias_correction or eps_inside_sqrt or max_grad_norm:
            raise ValueError(
                "1-bit LAMB has no bias_correction, eps_inside_sqrt or max_grad_norm; leave them "
                "out (gradient_clipping clips)"
            )
        if not freeze_step:
            raise ValueError("freeze_step must be at least 1: trust ratios are learnt before it")
        check_non_negative(min_coeff=min_coeff, coeff_beta=coeff_beta, factor_min=factor_min)
        check_non_negative(factor_threshold=factor_threshold)
        for what, low, high in (
            ("coeff", min_coeff, max_coeff),
            ("factor", factor_min, factor_max),
        ):
            if high < low:
                raise ValueError(f"max and min of {what} are {high} and {low}, the wrong way round")
        if coeff_beta > 1:
            raise ValueError(f"coeff_beta must be at most 1, got {coeff_beta}")
        self.freeze_step = int(freeze_step)
        self.defaults |= {
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
            "coeff_beta": coeff_beta,
            "factor_max": factor_max,
            "factor_min": factor_min,
            "factor_threshold": factor_threshold,
        }

    def states(self, bucket: BucketSpec) -> Sequence[StateSpec]:
        rows = StateSpec("lamb", torch.float32, numel=3 * len(bucket.segments))
        return [*map(StateSpec, _STATES), rows, *self.errors(bucket)]

    def wants_reduced(self, step: int) -> bool:
        return step <= self.freeze_step

    def update(self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor) -> None:
        rows = bucket.states["lamb"].view(-1, 3)
        if self.wants_reduced(bucket.step):
            for row, span in zip(rows, tensors(bucket, _STATES, scale), strict=True):
                _warm_up(span, row, hyper)
            return
        before = self._average_momentum(bucket, hyper, scale, rows)
        cuts = zip(rows, bucket.segments, tensors(bucket, _STATES, 1.0), strict=True)
        for row, segment, span in cuts:
            _go_on(span, segment.of(before), row, hyper)

    def _average_momentum(
        self,
        bucket: BucketView,
        hyper: Hyper,
        scale: float | torch.Tensor,
        rows: torch.Tensor,
    ) -> torch.Tensor:
        """Take in this rank's gradient, and average what that makes of the momentum.

        Returns:
            The momentum [n] of before.
        """
        dtype = wide_dtype(bucket.weights.dtype)
        momentum = bucket.states["exp_avg"].to(dtype, copy=True)
        if not bool(rows[:, _SCALING].any()):
            rows[:, _SCALING] = united_scales(momentum, bucket.segments)
        before = momentum.clone()
        momentum.lerp_(self.own_gradient(bucket, scale, dtype), 1 - hyper["betas"][0])
        for row, segment in zip(rows, bucket.segments, strict=True):
            segment.of(momentum).mul_(row[_SCALING])
        self.average(momentum, bucket, "momentum")
        for row, segment in zip(rows, bucket.segments, strict=True):
            segment.of(momentum).div_(row[_SCALING])
        momentum.masked_fill_(stays_zero(bucket, hyper), 0.0)
        bucket.states["exp_avg"].copy_(momentum)
        return before


def united_scales(momentum: torch.Tensor, segments: Sequence[Segment]) -> torch.Tensor:
    """Mean of the tensors' root mean squares over each tensor's own [tensors]; 1 for zeros."""
    own = torch.stack([_root_mean_square(segment.of(momentum)) for segment in segments])
    return torch.where(own > 0, own.mean() / own, torch.ones_like(own)).float()


def _root_mean_square(values: torch.Tensor) -> torch.Tensor:
    norm: torch.Tensor = torch.linalg.vector_norm(values)
    return norm / math.sqrt(max(values.numel(), 1))


def _warm_up(span: Span, row: torch.Tensor, hyper: Hyper) -> None:
    """LAMB, with an average of its trust ratio."""
    beta1, beta2 = hyper["betas"]
    momentum, variance = span.states["exp_avg"], span.states["exp_avg_sq"]
    momentum.lerp_(span.gradient, 1 - beta1)
    variance.mul_(beta2).addcmul_(span.gradient, span.gradient, value=1 - beta2)
    # The fresh moment goes on from the one that is frozen, so it is the same until then.
    span.states["exp_avg_sq_fresh"].copy_(variance)
    direction = momentum / variance.sqrt().add_(hyper["eps"])
    step = direction.add_(span.weights, alpha=hyper["weight_decay"])
    trust = _trust_ratio(span.weights, step, hyper)
    row[_TRUST].lerp_(trust.float(), 1 - hyper["coeff_beta"])
    span.weights.sub_(step.mul_(trust).mul_(hyper["lr"]))


def _go_on(span: Span, before: torch.Tensor, row: torch.Tensor, hyper: Hyper) -> None:
    """The update with a frozen second moment, of one tensor."""
    beta1, beta2 = hyper["betas"]
    momentum, frozen, fresh = (span.states[name] for name in _STATES)
    gradient = (momentum - before * beta1) / (1 - beta1)
    fresh.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
    root, root_now = (v.sqrt().add_(hyper["eps"]) for v in (frozen, fresh))
    direction = momentum / root
    step = direction.add(span.weights, alpha=hyper["weight_decay"])
    # Where there is no trust ratio, it is that of this update: the layout has changed.
    trust = torch.where(row[_TRUST] > 0, row[_TRUST], _trust_ratio(span.weights, step, hyper))
    row[_TRUST] = trust
    ratio = (root / root_now).amax() if root.numel() else root.new_ones(())
    factor = _factor(ratio, direction, step)
    row[_FACTOR] = _limited(factor, row[_FACTOR], hyper)
    span.weights.sub_(step.mul_(row[_TRUST] * row[_FACTOR]).mul_(hyper["lr"]))


def _factor(ratio: torch.Tensor, direction: torch.Tensor, step: torch.Tensor) -> torch.Tensor:
    """``ratio`` as far as ``direction`` makes up ``step``, which also has weight decay; else 1."""
    norm, whole = torch.linalg.vector_norm(direction), torch.linalg.vector_norm(step)
    share = torch.where(whole > 0, (norm / whole).clamp(max=1.0), torch.ones_like(whole))
    return torch.add(share * (ratio - 1), 1)


def _limited(factor: torch.Tensor, last: torch.Tensor, hyper: Hyper) -> torch.Tensor:
    """``factor`` within its bounds, and near the last one."""
    last = torch.where(last > 0, last, torch.ones_like(last))
    change = hyper["factor_threshold"]
    bounded = factor.clamp(hyper["factor_min"], hyper["factor_max"])
    return torch.minimum(torch.maximum(bounded, last * (1 - change)), last * (1 + change))


def _trust_ratio(weights: torch.Tensor, step: torch.Tensor, hyper: Hyper) -> torch.Tensor:
    """``|p| / |u|`` within its limits, 1 where a norm is 0."""
    norm, whole = torch.linalg.vector_norm(weights), torch.linalg.vector_norm(step)
    ratio = (norm / whole).clamp(hyper["min_coeff"], hyper["max_coeff"])
    return torch.where((norm > 0) & (whole > 0), ratio, torch.ones_like(ratio))
