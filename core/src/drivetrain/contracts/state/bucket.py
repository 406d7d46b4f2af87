"""Buckets, and what an optimizer is here: a rule over them, independent of where states live."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    import torch
    from torch import nn

    from drivetrain.contracts.state.parameters import ParameterInfo, Placement
    from drivetrain.contracts.world.axis import Axis


Hyper = Mapping[str, Any]
"""Live hyper-parameters of one group: ``lr``, ``betas``, ``weight_decay``, ..."""


@dataclass(frozen=True)
class Segment:
    """The part of one parameter that lies in a bucket.

    Args:
        name: the client's stable parameter name.
        shape: shape of the whole parameter (as this rank's module has it).
        start: index of the first element held, in the row-major flattened parameter.
        numel: number of elements held.
        offset: where they begin in the bucket.
        owner: whether this rank's copy is the first, which counts in norms and checkpoints.
        placement: which part of the client's tensor the parameter is; ``None`` for all of it.
    """

    name: str
    shape: tuple[int, ...]
    start: int
    numel: int
    offset: int
    owner: bool = True
    placement: Placement | None = None

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This segment's slice of a flat bucket tensor; shaped when the parameter is whole."""
        part = flat.narrow(0, self.offset, self.numel)
        whole = self.start == 0 and self.numel == prod(self.shape)
        return part.view(self.shape) if whole else part


@dataclass(frozen=True)
class BucketSpec:
    """Everything that decides where a bucket's states go; one dtype, reduction, rule and group.

    Args:
        key: stable across runs of one configuration; names error feedback, files and logs.
        numel: flat length, including padding after the last segment.
        segments: what lies where.
        parameter_dtype: dtype of the parameters in forward and backward.
        gradient_dtype: dtype of the gradients handed to :meth:`StateHome.update`.
        master_dtype: dtype of the master weights; equal to ``parameter_dtype`` when the
            parameters are their own masters.
        state_dtype: dtype of optimizer states that ask for none of their own.
        reduction: axes that gradients are summed over.
        rule: the update rule, or ``None`` for parameters that are not trained.
        group: index of the hyper-parameter group.
        device: the device that parameters and gradients are on.
        released: whether the parameters are needed now and then only, so that a home may keep them
            meanwhile (:class:`ParameterHome`).
        replicated: further axes along which ranks have copies, with equal gradients.
    """

    key: str
    numel: int
    segments: tuple[Segment, ...]
    parameter_dtype: torch.dtype
    gradient_dtype: torch.dtype
    master_dtype: torch.dtype
    state_dtype: torch.dtype
    reduction: Axis
    rule: UpdateRule | None
    group: int
    device: torch.device
    released: bool = False
    replicated: tuple[str, ...] = ()

    @property
    def has_masters(self) -> bool:
        """Whether master weights are kept beside the parameters."""
        return self.master_dtype != self.parameter_dtype


@dataclass(frozen=True)
class StateSpec:
    """One optimizer state of a bucket.

    Args:
        name: the field's usual name, e.g. ``"exp_avg"``.
        dtype: storage dtype; ``None`` for the bucket's ``state_dtype``.
        numel: flat length of a state that belongs to this rank's bucket and to no parameter; it is
            reset when the layout changes. ``None`` for one number per element of the weights.
        initial: value that a fresh state is filled with.
    """

    name: str
    dtype: torch.dtype | None = None
    numel: int | None = None
    initial: float = 0.0


@dataclass
class BucketView:
    """What a rule sees of one bucket during an update; all tensors are flat and equally long.

    Args:
        key: the bucket's stable key.
        weights: master weights [n], updated in place.
        gradient: accumulated, reduced gradient [n]; may be overwritten.
        states: the rule's declared states by name, updated in place.
        segments: where each parameter lies; whole tensors if the rule's grain is ``"tensor"``.
        step: which update this is for the bucket, counted from 1.
        out: low-precision copy of the weights [n] to write in the same pass, or ``None``.
        reduction: axes that the gradient is summed over, for rules that communicate.
    """

    key: str
    weights: torch.Tensor
    gradient: torch.Tensor
    states: dict[str, torch.Tensor]
    segments: Sequence[Segment]
    step: int
    out: torch.Tensor | None
    reduction: Axis


class UpdateRule(ABC):
    """Turns gradients into weight changes, bucket by bucket.

    Rules are found in the ``drivetrain.optimizers`` entry points under the value of
    ``optimizer.type``. The entry point is a subclass, whose keyword arguments are
    ``optimizer.params``, or a factory ``(params: Mapping, job: Job) -> UpdateRule``.

    Attributes:
        defaults: hyper-parameters that a group gets where it sets none, e.g. ``{"lr": 1e-3}``.
        grain: ``"element"`` when each element is updated on its own, so that a bucket may be cut
            anywhere; ``"tensor"`` when the rule needs whole tensors (Muon, Lamb).
    """

    defaults: dict[str, Any]
    grain: Literal["element", "tensor"] = "element"

    @abstractmethod
    def states(self, bucket: BucketSpec) -> Sequence[StateSpec]:
        """The states that ``bucket`` needs, in a fixed order."""

    @abstractmethod
    def update(self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor) -> None:
        """Apply one step to ``bucket.weights``.

        Args:
            bucket: weights, gradient, states; see :class:`BucketView`.
            hyper: hyper-parameters of the bucket's group, as they are now.
            scale: factor that turns ``bucket.gradient`` into the gradient to use; it folds loss
                scale, accumulation, divisor and clipping. A float, or a 0-d tensor on the device.
        """

    def apply(self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor) -> None:
        """:meth:`update` for homes; a scale of 0 makes zeros also of what is infinite or NaN.

        Clipping gives that scale to gradients that are not finite, where the host does not wait for
        the device to tell: the update must not write NaN into weights and states.
        """
        gradient = bucket.gradient
        if not isinstance(scale, (int, float)) and scale.device.type != "cpu":
            gradient.masked_fill_(scale.to(gradient.device) == 0, 0.0)  # without asking the device
        elif not scale:
            gradient.zero_()
        self.update(bucket, hyper, scale)

    def settle(self, bucket: BucketView, hyper: Hyper) -> None:  # noqa: B027 - most need not
        """Make what ranks have copies of equal, before it is saved or moved. Collective.

        For rules between whose synchronisations ranks have different weights and states.
        ``bucket.gradient`` is empty, and ``bucket.step`` the number of the last update.
        """

    def rule_for(self, parameter: nn.Parameter, info: ParameterInfo) -> UpdateRule:
        """Return the rule for one parameter: this one, by default (Muon hands some to Adam)."""
        return self

    def wants_reduced(self, step: int) -> bool:
        """Whether the update of ``step`` (from 1) takes reduced gradients.

        Rules that communicate compressed return ``False`` and do it in :meth:`update`; the states
        then skip the reduction and clip by the local norm.
        """
        return True

    @property
    def communicates(self) -> bool:
        """Whether some updates take gradients that are not reduced, see :meth:`wants_reduced`."""
        return type(self).wants_reduced is not UpdateRule.wants_reduced


class WrappedRule(UpdateRule):
    """Another rule, and something done before or after its updates; a base class.

    Everything is left to the inner rule. A subclass extends :meth:`update` and, with names of its
    own, :meth:`states`. If it changes ``bucket.weights`` after the inner update, it also copies
    them to ``bucket.out`` where that is not ``None``.

    A parameter that the inner rule hands to another one (Muon hands some to Adam) gets a shallow
    copy of this object around that.

    Args:
        rule: the inner rule.
    """

    def __init__(self, rule: UpdateRule) -> None:
        self.rule, self.defaults, self.grain = rule, rule.defaults, rule.grain
        self._others: dict[UpdateRule, WrappedRule] = {}

    def states(self, bucket: BucketSpec) -> Sequence[StateSpec]:
        return self.rule.states(bucket)

    def update(self, bucket: BucketView, hyper: Hyper, scale: float | torch.Tensor) -> None:
        self.rule.update(bucket, hyper, scale)

    def rule_for(self, parameter: nn.Parameter, info: ParameterInfo) -> UpdateRule:
        inner = self.rule.rule_for(parameter, info)
        if inner is not self.rule and inner not in self._others:
            self._others[inner] = copy.copy(self)
            WrappedRule.__init__(self._others[inner], inner)
        return self._others.get(inner, self)

    def settle(self, bucket: BucketView, hyper: Hyper) -> None:
        self.rule.settle(bucket, hyper)

    def wants_reduced(self, step: int) -> bool:
        return self.rule.wants_reduced(step)

    @property
    def communicates(self) -> bool:
        return self.rule.communicates


@dataclass(frozen=True)
class OptimizerPlan:
    """A rule and the groups it works on, ready to be placed by model states.

    Args:
        rule: the rule of all groups.
        groups: live dicts, shared with ``engine.optimizer.param_groups``; each has ``"params"``
            (the client's parameters) and the hyper-parameters that schedules change.
    """

    rule: UpdateRule
    groups: Sequence[dict[str, Any]] = field(default_factory=tuple)
