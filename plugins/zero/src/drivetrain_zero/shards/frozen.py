"""Buckets of parameters that are not trained: they are sharded at stage 3, but never updated."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Set
from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain.contracts import BucketSpec, Segment
from drivetrain.states.buckets import PlannedBucket
from drivetrain.tensor_parts import is_wrapper

if TYPE_CHECKING:
    from drivetrain.contracts import Axis, ParameterTable


_FROZEN = "frozen."


def is_frozen(key: str) -> bool:
    """Whether ``key`` is that of a bucket of :func:`plan_frozen`."""
    place, _, number = key.rpartition("b")
    return number.isdigit() and (place == _FROZEN or place.endswith(f".{_FROZEN}"))


def bucketed(
    parameters: Iterable[nn.Parameter], trained: Set[nn.Parameter], *, frozen: bool
) -> list[nn.Parameter]:
    """Return those of ``parameters`` that lie in buckets; the others stay whole on every rank.

    Args:
        parameters: of the module.
        trained: those that updates change.
        frozen: whether the others are in buckets, too, as far as they have memory of their own.
    """
    return [p for p in parameters if p in trained or (frozen and not is_wrapper(p))]


def plan_frozen(
    parameters: Iterable[nn.Parameter], table: ParameterTable, prefix: str
) -> list[PlannedBucket]:
    """One bucket for each dtype, device and set of copies among ``parameters``, of any dtype."""
    kinds: dict[tuple[torch.dtype, Axis, tuple[str, ...], torch.device], list[nn.Parameter]]
    kinds = defaultdict(list)
    for parameter in parameters:
        info = table.info(parameter)
        dtype = info.compute_dtype if parameter.is_floating_point() else parameter.dtype
        copies = info.reduction, table.replicated(info)
        kinds[dtype, *copies, parameter.device].append(parameter)
    planned = []
    for number, ((dtype, reduction, replicated, device), members) in enumerate(kinds.items()):
        segments, offset = [], 0
        for parameter in members:
            info, numel = table.info(parameter), parameter.numel()
            shape = tuple(parameter.shape)
            placement = info.placement
            segments.append(Segment(info.name, shape, 0, numel, offset, placement=placement))
            offset += numel
        spec = BucketSpec(
            key=f"{prefix}{_FROZEN}b{number}",
            numel=offset,
            segments=tuple(segments),
            parameter_dtype=dtype,
            gradient_dtype=dtype,
            master_dtype=dtype,
            state_dtype=dtype,
            reduction=reduction,
            rule=None,
            group=-1,
            device=device,
            replicated=replicated,
        )
        planned.append(PlannedBucket(spec, tuple(members), dtype, sparse=False, step=0))
    return planned
