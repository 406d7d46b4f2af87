"""Which parameter goes into which bucket and where, and which of its copies counts."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from math import prod
from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain.contracts.state.bucket import BucketSpec, Segment, WrappedRule
from drivetrain.contracts.world.collective import axis_name, is_float8
from drivetrain.contracts.world.communicator import is_first_copy
from drivetrain.errors import ConfigError
from drivetrain.tensor_parts import is_wrapper

if TYPE_CHECKING:
    from drivetrain.contracts.state.bucket import OptimizerPlan, UpdateRule
    from drivetrain.contracts.state.parameters import ParameterInfo, ParameterTable
    from drivetrain.contracts.world.axis import Axis
    from drivetrain.contracts.world.communicator import Communicator


@dataclass(frozen=True)
class BucketSizes:
    """Limits of the gradient buckets, in bytes of gradient.

    Args:
        regular: size at which a bucket is closed. Large enough to use the network well, small
            enough that reduction starts early.
        first: size of the first bucket to fill; small, so that communication starts soon.
    """

    regular: int
    first: int


@dataclass(frozen=True)
class PlannedBucket:
    """A bucket's spec and the parameters of its segments, in the same order.

    Args:
        spec: what a home needs to know.
        parameters: the parameter of each segment.
        wire_dtype: dtype in which gradients travel.
        sparse: whether gradients travel as (row indices, rows); such a bucket has one parameter.
        step: updates that the parameters' states have already seen.
    """

    spec: BucketSpec
    parameters: tuple[nn.Parameter, ...]
    wire_dtype: torch.dtype
    sparse: bool
    step: int


@dataclass(frozen=True)
class _Kind:
    """Parameters share a bucket exactly when all of this is equal."""

    group: int
    step: int
    rule: int
    parameter_dtype: torch.dtype
    gradient_dtype: torch.dtype
    master_dtype: torch.dtype
    state_dtype: torch.dtype
    wire_dtype: torch.dtype
    reduction: Axis
    replicated: tuple[str, ...]
    sparse: bool
    device: torch.device


def plan_buckets(
    parameters: Iterable[nn.Parameter],
    optimizer: OptimizerPlan,
    table: ParameterTable,
    communicator: Communicator,
    sizes: BucketSizes,
    *,
    gradient_dtype: torch.dtype | None,
    steps: Mapping[str, int],
    prefix: str = "",
) -> list[PlannedBucket]:
    """Cut the trainable parameters of all groups into buckets.

    Parameters are taken in reverse order, about that in which backward produces gradients, so the
    first bucket is the first to fill. Sparse ones come last: they wait for the end of the window.

    Args:
        parameters: in the module's order; those in no group are left out.
        optimizer: rule and groups.
        table: facts on every parameter.
        communicator: tells which of the copies of a parameter is this rank's.
        sizes: bucket limits.
        gradient_dtype: dtype that gradients accumulate in; ``None`` for each parameter's own.
        steps: parameter name -> updates that its states have seen; a bucket has one such count.
        prefix: what the buckets' keys begin with.
    """
    rules: dict[int, UpdateRule] = {}
    group_of = {p: i for i, group in enumerate(optimizer.groups) for p in group["params"]}
    open_buckets: dict[_Kind, list[nn.Parameter]] = defaultdict(list)
    filled: dict[_Kind, int] = defaultdict(int)
    # Each set of copies is cut by itself: ranks along other axes may have larger parts of others.
    limits: dict[tuple[Axis, ...], int] = defaultdict(lambda: sizes.first)
    closed: list[tuple[_Kind, list[nn.Parameter]]] = []
    for parameter in reversed(list(parameters)):
        if not parameter.requires_grad or parameter not in group_of:
            continue
        info = table.info(parameter)
        _refuse_untrainable(parameter, info)
        rule = optimizer.rule.rule_for(parameter, info)
        _refuse_part(info, rule)
        rules[id(rule)] = rule
        kind = _Kind(
            group=group_of[parameter],
            step=steps.get(info.name, 0),
            rule=id(rule),
            **_dtypes(info, gradient_dtype),
            reduction=info.reduction,
            replicated=table.replicated(info),
            sparse=info.sparse,
            device=parameter.device,
        )
        open_buckets[kind].append(parameter)
        filled[kind] += parameter.numel() * kind.gradient_dtype.itemsize
        copies = kind.reduction, kind.replicated
        if filled[kind] >= limits[copies] or info.sparse:
            closed.append((kind, open_buckets.pop(kind)))
            filled.pop(kind)
            limits[copies] = sizes.regular
    closed += open_buckets.items()
    closed.sort(key=lambda item: item[0].sparse)  # stable
    return [
        _planned(f"{prefix}g{kind.group}.b{n}", kind, members, table, communicator, rules)
        for n, (kind, members) in enumerate(closed)
    ]


def _dtypes(info: ParameterInfo, gradient: torch.dtype | None) -> dict[str, torch.dtype]:
    own, gradient = info.compute_dtype, info.gradient_dtype or gradient
    return {
        "parameter_dtype": own,
        "gradient_dtype": gradient or own,
        "master_dtype": info.master_dtype or own,
        "state_dtype": info.state_dtype or info.master_dtype or own,
        "wire_dtype": info.reduce_dtype or gradient or own,
    }


def _refuse_untrainable(parameter: nn.Parameter, info: ParameterInfo) -> None:
    if parameter.is_inference():
        raise ConfigError(
            f"parameter {info.name} was made inside torch.inference_mode(), where nothing can be "
            "trained; build the module outside"
        )
    if is_float8(info.compute_dtype) or is_wrapper(parameter):
        what = info.compute_dtype if is_float8(info.compute_dtype) else type(parameter).__name__
        raise ConfigError(
            f"parameter {info.name} is kept as {what}, in which nothing can be trained: freeze it "
            "(requires_grad_(False)), or make an ordinary tensor of it"
        )


def _refuse_part(info: ParameterInfo, rule: UpdateRule) -> None:
    placed = info.placement
    if rule.grain != "tensor" or placed is None:
        return
    if sum(box.numel for box in placed.boxes) < prod(placed.global_shape):
        while isinstance(rule, WrappedRule):
            rule = rule.rule
        raise ConfigError(
            f"optimizer: {type(rule).__name__} needs whole tensors, but of parameter {info.name} "
            f"{list(placed.global_shape)} each rank along {axis_name(placed.axis)} has a part: use "
            "an optimizer that updates each element by itself (AdamW, Lion, SGD), or leave the "
            "parameter whole"
        )


def _planned(
    key: str,
    kind: _Kind,
    members: list[nn.Parameter],
    table: ParameterTable,
    communicator: Communicator,
    rules: Mapping[int, UpdateRule],
) -> PlannedBucket:
    owner = is_first_copy(communicator, kind.reduction, kind.replicated)
    segments, offset = [], 0
    for parameter in members:
        segments.append(
            Segment(
                name=table.info(parameter).name,
                shape=tuple(parameter.shape),
                start=0,
                numel=parameter.numel(),
                offset=offset,
                owner=owner,
                placement=table.info(parameter).placement,
            )
        )
        offset += parameter.numel()
    spec = BucketSpec(
        key=key,
        numel=offset,
        segments=tuple(segments),
        parameter_dtype=kind.parameter_dtype,
        gradient_dtype=kind.gradient_dtype,
        master_dtype=kind.master_dtype,
        state_dtype=kind.state_dtype,
        reduction=kind.reduction,
        rule=rules[kind.rule],
        group=kind.group,
        device=kind.device,
        replicated=kind.replicated,
    )
    return PlannedBucket(spec, tuple(members), kind.wire_dtype, kind.sparse, kind.step)
