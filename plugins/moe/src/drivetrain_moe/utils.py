"""Functions that scripts for DeepSpeed call around the layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

from torch import nn

from drivetrain.errors import ConfigError
from drivetrain.job.job import open_jobs
from drivetrain_moe.layer import MoE
from drivetrain_moe.plugin import axes_of

if TYPE_CHECKING:
    import torch

    from drivetrain.job.job import Job
    from drivetrain_moe.axes import ExpertAxes


def has_moe_layers(module: nn.Module) -> tuple[bool, int]:
    """Return whether ``module`` has a :class:`MoE`, and how many experts the last one has."""
    counts = [part.num_experts for part in module.modules() if isinstance(part, MoE)]
    return bool(counts), counts[-1] if counts else 0


def is_moe_param(param: torch.Tensor) -> bool:
    """Whether a parameter belongs to experts that ranks share out, in an engine or to be."""
    if getattr(param, "allreduce", True) is False:
        return True
    for job in open_jobs():
        if isinstance(param, nn.Parameter) and param in job.parameters:
            return str(job.parameters.info(param).reduction).startswith("edp")
    return False


def split_params_into_shared_and_expert_params(
    params: Iterable[nn.Parameter],
) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
    """Return the parameters that all ranks have, and those of experts."""
    shared: list[nn.Parameter] = []
    experts: list[nn.Parameter] = []
    for parameter in params:
        (experts if is_moe_param(parameter) else shared).append(parameter)
    return shared, experts


def split_params_into_different_moe_groups_for_optimizer(
    param_groups: Mapping[str, Any] | Iterable[Mapping[str, Any]], max_group_size: int | None = None
) -> list[dict[str, Any]]:
    """Return the groups as they are: model states know which ranks have which experts.

    DeepSpeed needs groups of their own for experts; here a bucket never mixes parameters that are
    summed over different ranks, so groups say only what an optimizer needs.

    Args:
        param_groups: one group, or several.
        max_group_size: accepted; buckets have a size of their own.
    """
    groups = [param_groups] if isinstance(param_groups, Mapping) else param_groups
    return [dict(group) for group in groups]


def configure_moe_param_groups(model_parameters: Iterable[Any]) -> list[Any]:
    """Return what an optimizer is made of, as it is; see
    :func:`split_params_into_different_moe_groups_for_optimizer`.
    """
    return list(model_parameters)


def get_expert_parallel_group(group_name: str) -> Any:
    """The process group whose ranks share out experts; ``group_name`` is ``ep_size_N``."""
    job, axes = _expert_axes(group_name)
    return job.mesh.group(axes.experts or "data")


def get_expert_data_parallel_group(group_name: str) -> Any:
    """The process group whose ranks have copies of the same experts."""
    job, axes = _expert_axes(group_name)
    return job.mesh.group(axes.copies)


def get_expert_parallel_rank(group_name: str) -> int:
    """This rank's place among those that share out experts."""
    job, axes = _expert_axes(group_name)
    return job.mesh.coordinate(axes.experts) if axes.experts else 0


def get_expert_parallel_world_size(group_name: str) -> int:
    """How many ranks share out experts."""
    return _expert_axes(group_name)[1].size


def _expert_axes(group_name: str) -> tuple[Job, ExpertAxes]:
    jobs = open_jobs()
    if not jobs:
        raise ConfigError("groups of experts are there once an engine is: call initialize first")
    known = {f"ep_size_{size}": axes for size, axes in axes_of(jobs[-1].plan).items()}
    if group_name not in known:
        raise ConfigError(f"there is no expert group {group_name!r}; known: {', '.join(known)}")
    return jobs[-1], known[group_name]
