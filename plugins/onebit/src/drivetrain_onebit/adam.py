"""1-bit Adam as an update rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import BucketView, Communicator, Hyper, StateSpec
from drivetrain.optimization.spans import span_size, spans, wide_dtype
from drivetrain_onebit.rule import OneBitRule, stays_zero

if TYPE_CHECKING:
    from drivetrain.contracts import BucketSpec


class OneBitAdam(OneBitRule):
    """1-bit Adam (Tang et al. 2021, https://arxiv.org/abs/2102.02888, algorithm 1).

    During the first ``freeze_step`` updates it is Adam without bias correction, with decoupled
    weight decay, on gradients that are reduced as usual. After that the second moment is frozen;
    each rank updates the momentum with its own gradient, and the momenta are averaged with one
    bit per element, so gradients are no longer reduced.

    A group may hold ``"exp_avg_mask"``, a tensor of zeros and ones that broadcasts to each of its
    parameters: after the warm-up, momenta stay 0 where it is 0. Elements whose second moment is
    still 0 when it is frozen had no gradient so far; their momenta stay 0 by themselves.

    Args:
        communicator: carries the signs; over the axes that a bucket's gradients are summed over.
        lr: learning rate.
        betas: decay of both moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.
        freeze_step: updates of the warm-up.
        bias_correction: must be false, as the algorithm has none.
        cuda_aware: accepted, has no effect.
        comm_backend_name: accepted, has no effect; the job's communicator is used.

    Raises:
        ValueError: a value is out of range.
    """

    def __init__(
        self,
        communicator: Communicator,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        *,
        freeze_step: int = 100_000,
        bias_correction: bool = False,
        cuda_aware: bool = False,
        comm_backend_name: str = "nccl",
    ) -> None:
        super().__init__(communicator, lr, betas, eps, weight_decay, freeze_step=freeze_step)
        if bias_correction:
            raise ValueError("bias_correction must be false: 1-bit Adam has none")
        self.freeze_step = int(freeze_step)

    def states(self, bucket: BucketSpec) -> Sequence[StateSpec]:
        return [StateSpec("exp_avg"), StateSpec("exp_avg_sq"), *self.errors(bucket)]

    def wants_reduced(self, step: int) -> bool:
        return step <= self.freeze_step

    def update(self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor) -> None:
        dtype = wide_dtype(bucket.weights.dtype)
        warm_up = self.wants_reduced(bucket.step)
        if not warm_up:
            self._average_momentum(bucket, hyper, scale, dtype)
        beta1, beta2 = hyper["betas"]
        size = span_size(bucket.weights.device)
        factor = scale if warm_up else 1.0
        for span in spans(bucket, ["exp_avg", "exp_avg_sq"], factor, dtype, size):
            momentum, variance = span.states["exp_avg"], span.states["exp_avg_sq"]
            if warm_up:
                momentum.lerp_(span.gradient, 1 - beta1)
                variance.mul_(beta2).addcmul_(span.gradient, span.gradient, value=1 - beta2)
            direction = momentum / variance.sqrt().add_(hyper["eps"])
            span.weights.mul_(1 - hyper["lr"] * hyper["weight_decay"])
            span.weights.sub_(direction.mul_(hyper["lr"]))

    def _average_momentum(
        self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor, dtype: torch.dtype
    ) -> None:
        """Take in this rank's gradient, and average what that makes of the momentum."""
        states = bucket.states
        momentum = states["exp_avg"].to(dtype)
        momentum.lerp_(self.own_gradient(bucket, scale, dtype), 1 - hyper["betas"][0])
        self.average(momentum, bucket, "momentum")
        momentum.masked_fill_(stays_zero(bucket, hyper), 0.0)
        if momentum is not states["exp_avg"]:
            states["exp_avg"].copy_(momentum)
