"""Broadcast initial values; handle *loose* parameters, those that lie in no bucket."""

from __future__ import annotations

from collections.abc import Collection
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain.contracts.state.fragment import Fragment
from drivetrain.contracts.world.collective import Purpose, Tag
from drivetrain.contracts.world.communicator import is_first_copy
from drivetrain.job.ownership import lent, lent_fragments, lent_modules, refuse_orphans
from drivetrain.states.device_home import tensor_fragment
from drivetrain.states.whole import handed_over
from drivetrain.tensor_parts import copy_into, is_stored, tensor_parts

if TYPE_CHECKING:
    from drivetrain.contracts.state.bucket import OptimizerPlan
    from drivetrain.contracts.state.model_states import ModelStates
    from drivetrain.contracts.world.axis import Axis
    from drivetrain.job.job import Job


def broadcast_first(job: Job, tensor: torch.Tensor, key: str, *axes: Axis) -> None:
    """Make all ranks that differ along ``axes`` only start from the first one's values."""
    if tensor.is_meta or not tensor.numel():
        return
    for name, part in tensor_parts(tensor, key).items():
        dense = part if part.is_contiguous() else part.contiguous()
        for axis in axes:
            job.communicator.broadcast(dense, axis, Tag(Purpose.STATE, name, "initial values"))
        if dense is not part:
            copy_into(part, dense)


def trained_parameters(optimizer: OptimizerPlan | None) -> set[nn.Parameter]:
    """The parameters that an update changes."""
    groups = optimizer.groups if optimizer is not None else ()
    return {p for group in groups for p in group["params"] if p.requires_grad}


def synchronise_loose(job: Job, module: nn.Module, bucketed: Collection[nn.Parameter]) -> None:
    """Cast what is in no bucket to its compute dtype and make all ranks start from rank 0's.

    What another engine lends is left alone.

    Raises:
        ConfigError: the memory of a parameter or buffer cannot be reached.
    """
    left_alone = {*bucketed, *lent(module.parameters(), None)}
    for parameter in module.parameters():
        if parameter in left_alone:
            continue
        info = job.parameters.info(parameter)
        with handed_over([parameter]):
            values = parameter.data
        if parameter.is_floating_point() and not is_stored(parameter):
            parameter.data = values.to(info.compute_dtype)
        axes = info.reduction, job.parameters.replicated(info)
        broadcast_first(job, parameter.detach(), info.name, *axes)
    theirs = {id(b) for part in lent_modules(module, None) for b in part.buffers(recurse=False)}
    for _, buffer, info in job.parameters.buffers(module):
        if id(buffer) not in theirs:
            axes = info.reduction, job.parameters.replicated(info)
            broadcast_first(job, buffer, info.name, *axes)


def loose_fragments(
    job: Job, module: nn.Module, bucketed: Collection[nn.Parameter], states: ModelStates
) -> list[Fragment]:
    """The fragments of the parameters of ``module`` that are in no bucket of ``states``.

    Raises:
        TrainingError: one is in shards that no engine keeps any more.
    """
    refuse_orphans(module)
    found = lent_fragments(module, states)
    known = {*bucketed, *lent(module.parameters(), states)}
    for parameter in module.parameters():
        if parameter not in known:
            info = job.parameters.info(parameter)
            axes = info.reduction, job.parameters.replicated(info)
            owner = is_first_copy(job.communicator, *axes)
            fragment = partial(tensor_fragment, owner=owner, placement=info.placement)
            parts = tensor_parts(parameter.detach(), info.name)
            found += [fragment(name, "parameter", part) for name, part in parts.items()]
    return found
