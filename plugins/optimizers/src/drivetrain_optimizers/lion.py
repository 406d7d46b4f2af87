"""Lion: the sign of an interpolated momentum as update."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from drivetrain.contracts import BucketSpec, BucketView, Hyper, StateSpec, UpdateRule
from drivetrain.optimization.checks import check_betas, check_non_negative
from drivetrain.optimization.spans import span_size, spans, wide_dtype


class Lion(UpdateRule):
    """Lion (Chen et al. 2023, "Symbolic Discovery of Optimization Algorithms", Program 1).

    Args:
        lr: learning rate.
        betas: interpolation of the update and decay of the momentum.
        weight_decay: decoupled decay.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        weight_decay: float = 0.0,
    ) -> None:
        check_non_negative(lr=lr, weight_decay=weight_decay)
        check_betas(betas)
        self.defaults = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}

    def states(self, bucket: BucketSpec) -> Sequence[StateSpec]:
        return [StateSpec("exp_avg")]

    def update(self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor) -> None:
        size = span_size(bucket.weights.device)
        dtype = wide_dtype(bucket.weights.dtype)
        for span in spans(bucket, ["exp_avg"], scale, dtype, size):
            lion_(
                span.weights,
                span.gradient,
                span.states["exp_avg"],
                lr=hyper["lr"],
                betas=hyper["betas"],
                weight_decay=hyper["weight_decay"],
            )


def lion_(
    weights: torch.Tensor,
    gradient: torch.Tensor,
    momentum: torch.Tensor,
    *,
    lr: float,
    betas: tuple[float, float],
    weight_decay: float,
) -> None:
    """One step in place; all tensors have one shape and dtype."""
    direction = momentum.lerp(gradient, 1 - betas[0]).sign_()
    weights.mul_(1 - lr * weight_decay).sub_(direction.mul_(lr))
    momentum.lerp_(gradient, 1 - betas[1])
