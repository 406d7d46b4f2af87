"""Layers of a script's own that are tensor-parallel already, told by attributes of parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from drivetrain.contracts import Placement
from drivetrain.errors import ConfigError
from drivetrain_tensor.layout import Part

if TYPE_CHECKING:
    from drivetrain.job.job import Job

AXIS = "tp"


def is_parallel(module: nn.Module) -> bool:
    """Whether a parameter of ``module`` says that it is a part."""
    return any(_is_part(p) for p in module.parameters())


def describe(job: Job, module: nn.Module) -> None:
    """Note which parameters of a script's own layers are parts, and of what.

    Those with ``tensor_model_parallel`` set are equal parts along ``partition_dim``, in
    ``partition_stride`` sections one after another; those with ``sequence_parallel`` set are copies
    of whose gradient each rank has a term.

    Raises:
        ConfigError: attributes that do not fit the parameter; names it.
    """
    ranks, rank = job.mesh.size(AXIS), job.mesh.coordinate(AXIS)
    for parameter in module.parameters():
        info = job.parameters.info(parameter)
        if info.placement is None and _is_part(parameter):
            part = _part(info.name, parameter, ranks, rank)
            info.placement = Placement(part.whole, part.boxes, AXIS)
        elif getattr(parameter, "sequence_parallel", False):
            axes = info.reduction if isinstance(info.reduction, tuple) else (info.reduction,)
            names = tuple(axis for axis in axes if isinstance(axis, str))
            if AXIS not in names:
                info.reduction = (*names, AXIS)


def _is_part(parameter: nn.Parameter) -> bool:
    return bool(getattr(parameter, "tensor_model_parallel", False))


def _part(name: str, parameter: nn.Parameter, ranks: int, rank: int) -> Part:
    dim, stride = (
        getattr(parameter, "partition_dim", None),
        getattr(parameter, "partition_stride", 1),
    )
    if not isinstance(dim, int) or not 0 <= dim < parameter.dim():
        raise ConfigError(
            f"{name} has tensor_model_parallel set, and partition_dim {dim!r}, which is no "
            f"dimension of a tensor of shape {tuple(parameter.shape)}"
        )
    extent = parameter.shape[dim]
    if stride < 1 or extent % stride or (dim > 0 and stride > 1):
        raise ConfigError(
            f"{name} has partition_stride {stride}, which cannot be along dimension {dim} of "
            f"{extent}: sections are equal, and lie along dimension 0"
        )
    whole, each = list(parameter.shape), extent // stride
    whole[dim] = extent * ranks
    starts = [section * each * ranks + rank * each for section in range(stride)]
    return Part(tuple(whole), dim, tuple((start, start + each) for start in starts))
