"""0/1 Adam as an update rule."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import BucketView, Communicator, Hyper, StateSpec
from drivetrain.optimization.spans import wide_dtype
from drivetrain_onebit.policies import Policies
from drivetrain_onebit.rule import OneBitRule, stays_zero

if TYPE_CHECKING:
    from drivetrain.contracts import BucketSpec

_ELAPSED = "local_lr"


class ZeroOneAdam(OneBitRule):
    """0/1 Adam (Lu et al. 2022, https://arxiv.org/abs/2202.06009, algorithms 1 and 4).

    Adam without bias correction, with decoupled weight decay, in two phases
    (:class:`~drivetrain_onebit.policies.Policies` tells which update does what):

    1. The second moment is refreshed more and more rarely, by a gradient that is reduced as usual,
       which also goes into the momentum. In all other updates the momentum takes a gradient that is
       averaged with one bit per element, with error feedback.
    2. The second moment stays, and ranks communicate in some updates only. Each rank goes its own
       way from a common point, its *anchor*. To synchronise, ranks average how far they have come,
       times the root of the second moment, with one bit per element. All ranks go that way from the
       anchor, and momenta become what would have led there at the learning rates of these updates.
       Errors start from zero with this phase.

    Between two synchronisations ranks have different weights and momenta. Saving a checkpoint
    synchronises them first, as the algorithm allows it at any time; a run that is saved at other
    updates than its own synchronisations therefore takes a slightly different way.

    ``"exp_avg_mask"`` and elements without a second moment: as for 1-bit Adam.

    Args:
        communicator: carries the signs; over the axes that a bucket's gradients are summed over.
        lr: learning rate.
        betas: decay of both moments.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay.
        var_freeze_step: updates of the first phase.
        var_update_scaler: refreshes after which their distance doubles.
        local_step_scaler: updates of the second phase after which the distance of synchronisations
            doubles.
        local_step_clipper: its largest value.
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
        var_freeze_step: int = 100_000,
        var_update_scaler: int = 16,
        local_step_scaler: int = 32_678,
        local_step_clipper: int = 16,
        bias_correction: bool = False,
        cuda_aware: bool = False,
        comm_backend_name: str = "nccl",
    ) -> None:
        steps = {
            "var_freeze_step": var_freeze_step,
            "var_update_scaler": var_update_scaler,
            "local_step_scaler": local_step_scaler,
            "local_step_clipper": local_step_clipper,
        }
        super().__init__(communicator, lr, betas, eps, weight_decay, **steps)
        if bias_correction:
            raise ValueError("bias_correction must be false: 0/1 Adam has none")
        for name, value in steps.items():
            if not value:
                raise ValueError(f"{name} must be at least 1")
        self.policies = Policies(*map(int, steps.values()))

    def states(self, bucket: BucketSpec) -> Sequence[StateSpec]:
        found = [StateSpec("exp_avg"), StateSpec("exp_avg_sq")]
        if self.communicator.size(bucket.reduction) > 1:
            found += [
                # As wide as the masters, of which it is a copy: all ranks set out from these bits.
                StateSpec("anchor", bucket.master_dtype),
                StateSpec(_ELAPSED, torch.float32, numel=1),
            ]
        return [*found, *self.errors(bucket)]

    def wants_reduced(self, step: int) -> bool:
        return self.policies.refreshes(step)

    def update(self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor) -> None:
        dtype = wide_dtype(bucket.weights.dtype)
        if self.wants_reduced(bucket.step):
            gradient = bucket.gradient.to(dtype) * scale
            variance = bucket.states["exp_avg_sq"].to(dtype)
            beta2 = hyper["betas"][1]
            variance.mul_(beta2).addcmul_(gradient, gradient, value=1 - beta2)
            _put(bucket.states["exp_avg_sq"], variance)
        else:
            gradient = self.own_gradient(bucket, scale, dtype)
        local = self.policies.is_local(bucket.step) and "anchor" in bucket.states
        if local and self.policies.begins_local(bucket.step):
            self.forget_errors(bucket)
            self._set_out(bucket)
        if not local and not self.wants_reduced(bucket.step):
            self.average(gradient, bucket, "gradient")
        self._step(bucket, hyper, gradient)
        if local:
            bucket.states[_ELAPSED] += hyper["lr"]
            if self.policies.synchronises(bucket.step):
                self.settle(bucket, hyper)

    def _step(self, bucket: BucketView, hyper: Hyper, gradient: torch.Tensor) -> None:
        """Adam's step; the second moment is what it is."""
        momentum = bucket.states["exp_avg"].to(gradient.dtype)
        momentum.lerp_(gradient, 1 - hyper["betas"][0])
        momentum.masked_fill_(stays_zero(bucket, hyper), 0.0)
        _put(bucket.states["exp_avg"], momentum)
        weights = bucket.weights.to(gradient.dtype)
        decay = hyper["lr"] * hyper["weight_decay"]
        weights.mul_(1 - decay).sub_(momentum / self._root(bucket, hyper), alpha=hyper["lr"])
        _show(bucket, weights)

    def settle(self, bucket: BucketView, hyper: Hyper) -> None:
        """Synchronise, if this rank has gone its own way since the last time. Collective."""
        states = bucket.states
        if not self.policies.is_local(bucket.step) or not states.get(_ELAPSED, torch.zeros(1)):
            return
        dtype = wide_dtype(bucket.weights.dtype)
        root = self._root(bucket, hyper)
        way = (bucket.weights.to(dtype) - states["anchor"].to(dtype)).mul_(root)
        self.average(way, bucket, "way")
        momentum = way / -states[_ELAPSED].to(dtype)
        # Elements without momentum only decay, which ranks do alike.
        still = stays_zero(bucket, hyper)
        _put(states["exp_avg"], momentum.masked_fill_(still, 0.0))
        met = way.div_(root).add_(states["anchor"].to(dtype))
        _show(bucket, torch.where(still, bucket.weights.to(dtype), met))
        self._set_out(bucket)

    def _set_out(self, bucket: BucketView) -> None:
        """Begin a way of this rank's own."""
        bucket.states["anchor"].copy_(bucket.weights)
        bucket.states[_ELAPSED].zero_()

    def _root(self, bucket: BucketView, hyper: Hyper) -> torch.Tensor:
        variance = bucket.states["exp_avg_sq"].to(wide_dtype(bucket.weights.dtype))
        return variance.sqrt().add_(hyper["eps"])


def _put(state: torch.Tensor, value: torch.Tensor) -> None:
    """Store ``value``, unless it is the state itself."""
    if value is not state:
        state.copy_(value)


def _show(bucket: BucketView, weights: torch.Tensor) -> None:
    """New weights, and what the module sees of them."""
    _put(bucket.weights, weights)
    if bucket.out is not None:
        bucket.out.copy_(weights)
