"""Update rules over the fused ops: one pass over memory per step, with everything folded in.

A rule converts the bucket's gradient, applies the scale, updates weights and states in their
storage dtypes and writes the low-precision copy in one call. They are registered in
``drivetrain.optimizers`` as ``FusedAdam``, ``FusedAdamW``, ``FusedAdagrad``, ``FusedLion``,
``FusedLamb`` and ``FusedSGD``.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

import torch

from drivetrain.checked_call import call_checked
from drivetrain.contracts import BucketView, Hyper, StateSpec, UpdateRule
from drivetrain.errors import TrainingError
from drivetrain.optimization.checks import check_betas, check_non_negative
from drivetrain_kernels.checks import FLOATS
from drivetrain_kernels.ops import adagrad, adam, lamb, lion, sgd

if TYPE_CHECKING:
    from drivetrain.contracts import BucketSpec
    from drivetrain.job.job import Job

STATE_DTYPES: Mapping[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}
"""What ``state_dtype`` may be in a config."""


class FusedRule(UpdateRule):
    """What the fused rules share.

    Args:
        state_dtype: ``"fp32"``, ``"bf16"`` or ``"fp16"``; ``None`` for the bucket's.
        stochastic_rounding: round stores to bfloat16 stochastically, so that updates below half a
            unit in the last place are not lost. Ranks that hold copies of a bucket round alike.

    Raises:
        ValueError: ``state_dtype`` is none of these.
    """

    state_names: ClassVar[tuple[str, ...]] = ()

    def __init__(self, state_dtype: str | None = None, stochastic_rounding: bool = False) -> None:
        if state_dtype is not None and state_dtype not in STATE_DTYPES:
            known = ", ".join(STATE_DTYPES)
            raise ValueError(f"state_dtype must be one of {known}, got {state_dtype!r}")
        self._state_dtype = None if state_dtype is None else STATE_DTYPES[state_dtype]
        self._stochastic = stochastic_rounding

    def states(self, bucket: BucketSpec) -> Sequence[StateSpec]:
        return [StateSpec(name, self._state_dtype) for name in self.state_names]

    def update(self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor) -> None:
        if bucket.weights.dtype not in FLOATS:
            raise TrainingError(
                f"bucket {bucket.key}: fused rules keep weights in float32, bfloat16 or float16, "
                f"got {bucket.weights.dtype}; use the optimizer without 'Fused' in its name"
            )
        folded: dict[str, Any] = {"out": bucket.out, "scale": scale, "seed": self._seed(bucket)}
        self._step(bucket, hyper, folded)

    def _step(self, bucket: BucketView, hyper: Hyper, folded: dict[str, Any]) -> None:
        raise NotImplementedError

    def _seed(self, bucket: BucketView) -> int | None:
        """Different for every bucket and step, equal on ranks that hold copies of the bucket."""
        if not self._stochastic:
            return None
        return (zlib.crc32(bucket.key.encode()) << 31) + bucket.step


class FusedAdam(FusedRule):
    """Adam, with decoupled weight decay unless ``adam_w_mode`` is false.

    Args:
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled, or added to the gradient.
        adam_w_mode: whether weight decay is decoupled.
        bias_correction: divide the moments by ``1 - beta**step``.
        state_dtype: see :class:`FusedRule`.
        stochastic_rounding: see :class:`FusedRule`.

    Raises:
        ValueError: a value is out of range.
    """

    state_names = ("exp_avg", "exp_avg_sq")

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        adam_w_mode: bool = True,
        bias_correction: bool = True,
        state_dtype: str | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(state_dtype, stochastic_rounding)
        check_non_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        check_betas(betas)
        self._mode: dict[str, Any] = {"decoupled": adam_w_mode, "bias_correction": bias_correction}
        self.defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
        }

    def _step(self, bucket: BucketView, hyper: Hyper, folded: dict[str, Any]) -> None:
        adam(
            bucket.weights,
            bucket.gradient,
            bucket.states["exp_avg"],
            bucket.states["exp_avg_sq"],
            step=bucket.step,
            **_chosen(hyper, self.defaults),
            **self._mode,
            **folded,
        )


class FusedAdagrad(FusedRule):
    """Adagrad.

    Args:
        lr: learning rate.
        eps: added to the root of the sum.
        weight_decay: added to the gradient.
        state_dtype: see :class:`FusedRule`.
        stochastic_rounding: see :class:`FusedRule`.

    Raises:
        ValueError: a value is out of range.
    """

    state_names = ("sum",)

    def __init__(
        self,
        lr: float = 1e-2,
        *,
        eps: float = 1e-10,
        weight_decay: float = 0.0,
        state_dtype: str | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(state_dtype, stochastic_rounding)
        check_non_negative(lr=lr, eps=eps, weight_decay=weight_decay)
        self.defaults = {"lr": lr, "eps": eps, "weight_decay": weight_decay}

    def _step(self, bucket: BucketView, hyper: Hyper, folded: dict[str, Any]) -> None:
        chosen = _chosen(hyper, self.defaults)
        adagrad(bucket.weights, bucket.gradient, bucket.states["sum"], **chosen, **folded)


class FusedLion(FusedRule):
    """Lion.

    Args:
        lr: learning rate.
        betas: interpolation of the update and decay of the momentum.
        weight_decay: decoupled decay.
        state_dtype: see :class:`FusedRule`.
        stochastic_rounding: see :class:`FusedRule`.

    Raises:
        ValueError: a value is out of range.
    """

    state_names = ("exp_avg",)

    def __init__(
        self,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        *,
        weight_decay: float = 0.0,
        state_dtype: str | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(state_dtype, stochastic_rounding)
        check_non_negative(lr=lr, weight_decay=weight_decay)
        check_betas(betas)
        self.defaults = {"lr": lr, "betas": tuple(betas), "weight_decay": weight_decay}

    def _step(self, bucket: BucketView, hyper: Hyper, folded: dict[str, Any]) -> None:
        chosen = _chosen(hyper, self.defaults)
        lion(bucket.weights, bucket.gradient, bucket.states["exp_avg"], **chosen, **folded)


class FusedSGD(FusedRule):
    """SGD with momentum.

    Args:
        lr: learning rate.
        momentum: decay of the buffer; without it there is no buffer.
        dampening: the buffer takes ``1 - dampening`` of the gradient.
        weight_decay: added to the gradient.
        nesterov: look ahead along the new buffer.
        state_dtype: see :class:`FusedRule`.
        stochastic_rounding: see :class:`FusedRule`.

    Raises:
        ValueError: a value is out of range, or ``nesterov`` without momentum or with dampening.
    """

    def __init__(
        self,
        lr: float = 1e-3,
        momentum: float = 0.0,
        *,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        state_dtype: str | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(state_dtype, stochastic_rounding)
        check_non_negative(lr=lr, momentum=momentum, weight_decay=weight_decay)
        if nesterov and (momentum == 0 or dampening != 0):
            raise ValueError("nesterov needs momentum and no dampening")
        self._keeps_momentum = momentum != 0
        self.defaults = {
            "lr": lr,
            "momentum": momentum,
            "dampening": dampening,
            "weight_decay": weight_decay,
            "nesterov": nesterov,
        }

    def states(self, bucket: BucketSpec) -> Sequence[StateSpec]:
        return [StateSpec("momentum_buffer", self._state_dtype)] if self._keeps_momentum else []

    def _step(self, bucket: BucketView, hyper: Hyper, folded: dict[str, Any]) -> None:
        buffer = bucket.states.get("momentum_buffer")
        chosen = _chosen(hyper, self.defaults)
        first = bucket.step == 1
        sgd(bucket.weights, bucket.gradient, buffer, first=first, **chosen, **folded)


class FusedLamb(FusedRule):
    """LAMB; the trust ratio is taken over each tensor as this rank's module has it.

    Args:
        lr: learning rate.
        betas: decay of the first and second moment.
        eps: added to the root of the second moment.
        weight_decay: decoupled decay, part of the update whose norm is taken.
        bias_correction: divide the moments by ``1 - beta**step``.
        max_coeff: largest trust ratio.
        min_coeff: smallest trust ratio.
        state_dtype: see :class:`FusedRule`.
        stochastic_rounding: see :class:`FusedRule`.

    Raises:
        ValueError: a value is out of range.
    """

    grain = "tensor"
    state_names = ("exp_avg", "exp_avg_sq")

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
        state_dtype: str | None = None,
        stochastic_rounding: bool = False,
    ) -> None:
        super().__init__(state_dtype, stochastic_rounding)
        check_non_negative(lr=lr, eps=eps, weight_decay=weight_decay, min_coeff=min_coeff)
        check_betas(betas)
        if max_coeff < min_coeff:
            raise ValueError(f"max_coeff {max_coeff} is below min_coeff {min_coeff}")
        self._mode: dict[str, Any] = {
            "bias_correction": bias_correction,
            "trust_range": (min_coeff, max_coeff),
        }
        self.defaults = {
            "lr": lr,
            "betas": tuple(betas),
            "eps": eps,
            "weight_decay": weight_decay,
        }

    def _step(self, bucket: BucketView, hyper: Hyper, folded: dict[str, Any]) -> None:
        lamb(
            bucket.weights,
            bucket.gradient,
            bucket.states["exp_avg"],
            bucket.states["exp_avg_sq"],
            bounds=_bounds(bucket),
            step=bucket.step,
            **_chosen(hyper, self.defaults),
            **self._mode,
            **folded,
        )


def _chosen(hyper: Hyper, defaults: Mapping[str, Any]) -> dict[str, Any]:
    return {name: hyper[name] for name in defaults}


def _bounds(bucket: BucketView) -> list[int]:
    """Ends of the tensors in the bucket; gaps and padding are tensors of their own, all zeros."""
    edges = {0, bucket.weights.numel()}
    for segment in bucket.segments:
        edges |= {segment.offset, segment.offset + segment.numel}
    return sorted(edges)


# -- factories named by the entry points -----------------------------------------------------------

RuleT = TypeVar("RuleT", bound=FusedRule)


def _factory(kind: Callable[..., RuleT]) -> Callable[[Mapping[str, Any], Job], RuleT]:
    def make(params: Mapping[str, Any], job: Job) -> RuleT:
        rule: RuleT = call_checked("optimizer.params", kind, params)
        return rule

    return make


fused_adam = _factory(FusedAdam)
fused_adagrad = _factory(FusedAdagrad)
fused_lamb = _factory(FusedLamb)
fused_lion = _factory(FusedLion)
fused_sgd = _factory(FusedSGD)


def fused_adamw(params: Mapping[str, Any], job: Job) -> FusedAdam:
    """:func:`fused_adam` with decoupled weight decay, whatever ``adam_w_mode`` says."""
    return fused_adam({**params, "adam_w_mode": True}, job)
