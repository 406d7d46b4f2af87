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
    dense = tensor if tensor.is_contiguous() else tensor.contiguous()
    job.communicator.broadcast(dense, axis, Tag(Purpose.STATE, key, "initial values"))
    if dense is not tensor:
        tensor.copy_(dense)


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
    """Cast what is in no bucket to its compute dtype and make all ranks start from rank 0's."""
    for parameter in module.parameters():
        if parameter in bucketed:
            continue
        info = job.parameters.info(parameter)
        with handed_over([parameter]):
            values = parameter.data
        parameter.data = values.to(info.compute_dtype) if parameter.is_floating_point() else values
        broadcast_first(job, parameter.data, info.reduction, info.name)
    for name, buffer in module.named_buffers():
        broadcast_first(job, buffer, "data", name)


def loose_fragments(
    job: Job, module: nn.Module, bucketed: Collection[nn.Parameter]
) -> list[Fragment]:
    """The fragments of the parameters of ``module`` that are in no bucket."""
    found = []
    for parameter in module.parameters():
        if parameter not in bucketed:
            info, data = job.parameters.info(parameter), parameter.data
            owner = info.owner and job.communicator.rank(info.reduction) == 0
            fragment = partial(tensor_fragment, owner=owner, placement=info.placement)
            found.append(fragment(info.name, "parameter", data))
    return found
