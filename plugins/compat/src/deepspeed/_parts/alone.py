"""Update rules over single parameters, for scripts that step an optimizer without an engine."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import nn

from drivetrain.contracts import BucketSpec, BucketView, Segment
from drivetrain.optimization.factory import make_rule
from drivetrain.plan.registry import Registry

if TYPE_CHECKING:
    from drivetrain.job.job import Job


class AloneRule:
    """The rule that a config would name, applied to one parameter after another.

    Each parameter is a bucket of its own; its states have its shape.

    Args:
        type_name: ``optimizer.type``, of a rule that asks nothing of a job.
        params: ``optimizer.params``.

    Raises:
        ConfigError: a parameter of the rule is unknown or out of range.
    """

    def __init__(self, type_name: str, params: Mapping[str, Any]) -> None:
        no_job = cast("Job", None)
        self._rule = make_rule(type_name, dict(params), Registry.installed(), no_job)

    @torch.no_grad()
    def update(
        self, parameter: nn.Parameter, state: dict[str, Any], group: Mapping[str, Any]
    ) -> None:
        """Apply ``parameter.grad``.

        Args:
            parameter: updated in place.
            state: of the optimizer, for this parameter; filled at the first update.
            group: hyper-parameters.
        """
        gradient = parameter.grad
        if gradient is None:
            return
        dense = gradient.to_dense() if gradient.is_sparse else gradient
        weights = parameter.detach().contiguous()
        spec = _bucket(parameter, dense.dtype)
        if not state:
            state["step"] = 0
            for own in self._rule.states(spec):
                dtype = own.dtype or spec.state_dtype
                state[own.name] = torch.full_like(weights, own.initial, dtype=dtype)
        state["step"] += 1
        states = {name: kept.view(-1) for name, kept in state.items() if name != "step"}
        flat = dense.detach().reshape(-1).clone()  # rules may write to it
        view = BucketView(
            spec.key, weights.view(-1), flat, states, spec.segments, state["step"], None, "data"
        )
        self._rule.update(view, {**self._rule.defaults, **group}, 1.0)
        if weights.data_ptr() != parameter.data_ptr():
            parameter.copy_(weights)

    @torch.no_grad()
    def take_over(
        self, parameter: nn.Parameter, state: dict[str, Any], saved: Mapping[str, Any]
    ) -> None:
        """Have the states of a checkpoint in this rule's dtypes; torch gives them the parameter's.

        Args:
            parameter: whose states.
            state: as torch has loaded it; changed in place.
            saved: as it was in the checkpoint.
        """
        spec = _bucket(parameter, parameter.dtype)
        for own in self._rule.states(spec):
            if own.name in saved:
                dtype = own.dtype or spec.state_dtype
                state[own.name] = saved[own.name].to(parameter.device, dtype, copy=True)
        if "step" in saved:
            state["step"] = int(saved["step"])


def _bucket(parameter: nn.Parameter, gradient_dtype: torch.dtype) -> BucketSpec:
    numel, shape = parameter.numel(), tuple(parameter.shape)
    return BucketSpec(
        key="parameter",
        numel=numel,
        segments=(Segment("parameter", shape, 0, numel, 0),),
        parameter_dtype=parameter.dtype,
        gradient_dtype=gradient_dtype,
        master_dtype=parameter.dtype,
        state_dtype=parameter.dtype,
        reduction="data",
        rule=None,
        group=0,
        device=parameter.device,
    )
