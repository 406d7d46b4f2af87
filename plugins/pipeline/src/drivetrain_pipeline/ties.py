"""Facts about parameters of stages: which ranks have others, and which share one."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING

from torch import nn

from drivetrain.contracts import SubAxis, axis_name
from drivetrain.errors import ConfigError
from drivetrain_pipeline.section import PATH

if TYPE_CHECKING:
    from drivetrain.contracts import Axis
    from drivetrain.job.job import Job


def describe(
    job: Job,
    module: nn.Module,
    holders: Mapping[nn.Parameter, set[int]],
    own: Iterable[nn.Module],
) -> None:
    """Say of each parameter which stages have it.

    One that several stages have (an embedding that is the head, too) is summed over these stages
    as it is over data shards, so it is counted and saved once.

    Args:
        job: whose table of parameters is filled.
        module: this rank's part of the model.
        holders: stages that have each parameter.
        own: parts that no other stage has.

    Raises:
        ConfigError: gradients of one that several stages have are summed over a part of an axis.
    """
    for parameter in module.parameters():
        info, stages = job.parameters.info(parameter), holders.get(parameter, set())
        if len(stages) > 1:
            info.reduction = with_stages(job, info.reduction, sorted(stages), info.name)
        else:
            info.distinct = (*info.distinct, "pp")
    for part in own:
        for inner in part.modules():
            for name, buffer in inner._buffers.items():
                if buffer is not None:
                    about = job.parameters.buffer(inner, name)
                    about.distinct = (*about.distinct, "pp")


def with_stages(job: Job, axis: Axis, stages: list[int], name: str) -> Axis:
    """The ranks of ``axis`` on each of ``stages``, which have parameter ``name``."""
    if isinstance(axis, SubAxis):
        raise ConfigError(
            f"{PATH}.stages: stages {', '.join(map(str, stages))} share parameter {name}, whose "
            f"gradients are summed over a part of an axis alone ({axis_name(axis)}), and such a "
            "sum cannot go over stages, too: let each stage have a parameter of its own, or "
            "leave out the plugin that sums so"
        )
    names = (axis,) if isinstance(axis, str) else axis
    product = ("pp", *names)
    size, inside = job.mesh.size("pp"), job.mesh.size(names)
    if len(stages) == size:
        return product
    return job.mesh.subgroup(product, [s * inside + i for s in stages for i in range(inside)])


def tied(module: nn.Module, holders: Mapping[nn.Parameter, set[int]]) -> list[nn.Parameter]:
    """Trained parameters that other stages have, too."""
    return [p for p in module.parameters() if p.requires_grad and len(holders.get(p, set())) > 1]
