"""LAMB: Adam whose step has a length proportional to the norm of each tensor."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from drivetrain.contracts import BucketSpec, BucketView, Hyper, StateSpec, UpdateRule
from drivetrain.optimization.checks import check_betas, check_non_negative
from drivetrain.optimization.spans import tensors


class Lamb(UpdateRule):
    """LAMB (You et al. 2020, "Large Batch Optimization for Deep Learning", Algorithm 2).

    The trust ratio is taken over each tensor as this rank's module has it, so a parameter that is
    cut by tensor parallelism has one ratio per shard.

    Args:
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, part of the update whose norm is taken.
        bias_correction: divide the moments by ``1 - beta**step``, as in the paper; off by default,
            as in the fused kernels that this name is used for.
        max_coeff: largest trust ratio.
        min_coeff: smallest trust ratio.
        eps_inside_sqrt: add ``eps`` under the root instead.

    Raises:
        ValueError: a value is out of range.
    """

    grain = "tensor"

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        bias_correction: bool = False,
        max_coeff: float = 10.0,
        min_coeff: float = 0.01,
        eps_inside_sqrt: bool = False,
    ) -> None:
        check_non_negative(lr=lr, eps=eps, weight_decay=weight_decay, min_coeff=min_coeff)
        check_betas(betas)
        if max_coeff < min_coeff:
            raise ValueError(f"max_coeff {max_coeff} is below min_coeff {min_coeff}")
        self.defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
            "bias_correction": bias_correction,
            "max_coeff": max_coeff,
            "min_coeff": min_coeff,
            "eps_inside_sqrt": eps_inside_sqrt,
        }

    def states(self, bucket: BucketSpec) -> Sequence[StateSpec]:
        return [StateSpec("exp_avg"), StateSpec("exp_avg_sq")]

    def update(self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor) -> None:
        beta1, beta2 = hyper["betas"]
        for span in tensors(bucket, ["exp_avg", "exp_avg_sq"], scale):
            mean, square = span.states["exp_avg"], span.states["exp_avg_sq"]
            mean.lerp_(span.gradient, 1 - beta1)
            square.lerp_(span.gradient.square(), 1 - beta2)
            step = lamb_direction(span.weights, mean, square, bucket.step, hyper)
            trust = trust_ratio(span.weights, step, hyper)
            span.weights.sub_(step.mul_(trust).mul_(hyper["lr"]))


def lamb_direction(
    weights: torch.Tensor, mean: torch.Tensor, square: torch.Tensor, step: int, hyper: Hyper
) -> torch.Tensor:
    """``m / (sqrt(v) + eps) + weight_decay * p``."""
    if hyper["bias_correction"]:
        beta1, beta2 = hyper["betas"]
        mean, square = mean / (1 - beta1**step), square / (1 - beta2**step)
    eps = hyper["eps"]
    root = (square + eps).sqrt_() if hyper["eps_inside_sqrt"] else square.sqrt().add_(eps)
    return (mean / root).add_(weights, alpha=hyper["weight_decay"])


def trust_ratio(weights: torch.Tensor, step: torch.Tensor, hyper: Hyper) -> torch.Tensor:
    """``|p| / |u|`` within its limits, 1 where a norm is 0; a 0-d tensor, so no device waits."""
    weight_norm, step_norm = torch.linalg.vector_norm(weights), torch.linalg.vector_norm(step)
    ratio = (weight_norm / step_norm).clamp_(hyper["min_coeff"], hyper["max_coeff"])
    return torch.where((weight_norm > 0) & (step_norm > 0), ratio, torch.ones_like(ratio))
