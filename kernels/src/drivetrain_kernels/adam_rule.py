"""``Adam`` and ``AdamW`` of a config, in one pass over memory where that is faster.

Torch's fused kernel takes tensors of one dtype, so a bucket with low-precision gradients or
parameters and float32 masters costs it several passes, one for each cast. Where all dtypes are
equal it is as fast as the kernel here, and is used.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from drivetrain.contracts import BucketView, Hyper, StateSpec, UpdateRule
from drivetrain.optimization import factory
from drivetrain_kernels.checks import FLOATS
from drivetrain_kernels.ops.adam import ADAM
from drivetrain_kernels.ops.adam import adam as adam_in_one_pass
from drivetrain_kernels.registry import REFERENCE

if TYPE_CHECKING:
    import torch

    from drivetrain.contracts import BucketSpec
    from drivetrain.job.job import Job

_TORCHS_OWN = ("amsgrad", "maximize", "foreach", "capturable", "differentiable")
"""Options of torch's class that the kernel has not."""


class Adam(UpdateRule):
    """Core's rule, and the fused kernel for the buckets that it serves better.

    Args:
        rule: core's rule; its states and hyper-parameters are this one's.
        decoupled: whether weight decay is decoupled (AdamW).
        bias_correction: divide the moments by ``1 - beta**step``.
    """

    def __init__(self, rule: UpdateRule, *, decoupled: bool, bias_correction: bool) -> None:
        self.defaults = rule.defaults
        self._rule = rule
        self._mode = {"decoupled": decoupled, "bias_correction": bias_correction}

    def states(self, bucket: BucketSpec) -> Sequence[StateSpec]:
        return self._rule.states(bucket)

    def update(self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor) -> None:
        if not _in_one_pass(bucket, hyper):
            self._rule.update(bucket, hyper, scale)
            return
        adam_in_one_pass(
            bucket.weights,
            bucket.gradient,
            bucket.states["exp_avg"],
            bucket.states["exp_avg_sq"],
            step=bucket.step,
            lr=hyper["lr"],
            betas=hyper["betas"],
            eps=hyper["eps"],
            weight_decay=hyper["weight_decay"],
            out=bucket.out,
            scale=scale,
            **self._mode,
        )


def adam(params: Mapping[str, Any], job: Job) -> UpdateRule:
    """The rule of ``optimizer.type: Adam``; takes what core's takes."""
    rule = factory.adam(params, job)
    if params.get("torch_adam", False):
        return rule
    return Adam(
        rule,
        decoupled=params.get("adam_w_mode", True),
        bias_correction=params.get("bias_correction", True),
    )


def adamw(params: Mapping[str, Any], job: Job) -> UpdateRule:
    """:func:`adam` with decoupled weight decay, whatever ``adam_w_mode`` says."""
    return adam({**params, "adam_w_mode": True}, job)


def _in_one_pass(bucket: BucketView, hyper: Hyper) -> bool:
    dtypes = {tensor.dtype for tensor in (bucket.weights, bucket.gradient, *bucket.states.values())}
    if bucket.out is not None:
        dtypes.add(bucket.out.dtype)
    wants_torch = hyper.get("fused") is False or any(hyper.get(key) for key in _TORCHS_OWN)
    if len(dtypes) == 1 or not dtypes <= set(FLOATS) or wants_torch:
        return False
    # A learning rate on the device would have to be waited for.
    return isinstance(hyper["lr"], (int, float)) and _is_native(bucket.weights.device.type)


def _is_native(device_type: str) -> bool:
    return ADAM.provider(device_type) != REFERENCE
