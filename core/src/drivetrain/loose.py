"""Values that all ranks start from, and the parameters that no bucket holds."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import partial
from typing import TYPE_CHECKING

import torch
from torch import nn

from drivetrain.communicator import Purpose, Tag
from drivetrain.errors import TrainingError
from drivetrain.fragment import Fragment
from drivetrain.home import tensor_fragment
from drivetrain.parameters import handed_over
from drivetrain.tensor_parts import copy_into, is_stored, tensor_parts

if TYPE_CHECKING:
    from drivetrain.gradients import Slot
    from drivetrain.job import Job
    from drivetrain.mesh import Axis
    from drivetrain.parameters import ParameterTable
    from drivetrain.update_rule import OptimizerPlan


def broadcast_first(job: Job, tensor: torch.Tensor, axis: Axis, key: str) -> None:
    """Make all ranks of ``axis`` start from the first one's values."""
    if tensor.is_meta or not tensor.numel():
        return
    for name, part in tensor_parts(tensor, key).items():
        dense = part if part.is_contiguous() else part.contiguous()
        job.communicator.broadcast(dense, axis, Tag(Purpose.STATE, name, "initial values"))
        if dense is not part:
            copy_into(part, dense)


def trained_parameters(optimizer: OptimizerPlan | None) -> set[nn.Parameter]:
    """The parameters that an update changes."""
    groups = optimizer.groups if optimizer is not None else ()
    return {p for group in groups for p in group["params"] if p.requires_grad}


def refuse_stale_layout(
    optimizer: OptimizerPlan, bucketed: Mapping[nn.Parameter, Slot], table: ParameterTable
) -> None:
    """Check that exactly the parameters that take gradients are in buckets, and as they were put.

    Raises:
        TrainingError: some were frozen, unfrozen or cast since the buckets were laid out, or
            changed in place beside their masters.
    """
    for group in optimizer.groups:
        for parameter in group["params"]:
            if parameter.requires_grad is not (parameter in bucketed):
                change = "unfrozen" if parameter.requires_grad else "frozen"
                raise TrainingError(
                    f"parameter {table.info(parameter).name} was {change} after the engine was "
                    "built; call engine.rebuild() after changing requires_grad"
                )
    for parameter, slot in bucketed.items():
        if parameter.dtype is not slot.dtype:
            raise TrainingError(
                f"parameter {slot.name} was cast from {slot.dtype} to {parameter.dtype} after the "
                "engine was built, whose updates it does not see now; set the precision in the "
                "config instead"
            )
        if parameter._version != slot.version:
            if table.info(parameter).master_dtype and not hasattr(parameter, "drivetrain_handle"):
                raise TrainingError(
                    f"parameter {slot.name} was changed in place after the engine was built, and "
                    "the step would undo that from its master weight; load weights with "
                    "engine.load_module_state_dict(), or change them on every rank and then call "
                    "engine.states.refresh()"
                )
            slot.note()


def synchronise_loose(job: Job, module: nn.Module, bucketed: Collection[nn.Parameter]) -> None:
    """Cast what is in no bucket to its compute dtype and make all ranks start from rank 0's.

    Raises:
        ConfigError: the memory of a parameter or buffer cannot be reached.
    """
    for parameter in module.parameters():
        if parameter in bucketed:
            continue
        info = job.parameters.info(parameter)
        with handed_over([parameter]):
            values = parameter.data
        if parameter.is_floating_point() and not is_stored(parameter):
            parameter.data = values.to(info.compute_dtype)
        broadcast_first(job, parameter.detach(), info.reduction, info.name)
    for name, buffer in module.named_buffers():
        broadcast_first(job, buffer, "data", name)


def loose_fragments(
    job: Job, module: nn.Module, bucketed: Collection[nn.Parameter]
) -> list[Fragment]:
    """The fragments of the parameters of ``module`` that are in no bucket."""
    found = []
    for parameter in module.parameters():
        if parameter not in bucketed:
            info = job.parameters.info(parameter)
            owner = info.owner and job.communicator.rank(info.reduction) == 0
            fragment = partial(tensor_fragment, owner=owner, placement=info.placement)
            parts = tensor_parts(parameter.detach(), info.name)
            found += [fragment(name, "parameter", part) for name, part in parts.items()]
    return found
