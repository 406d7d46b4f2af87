"""Share out the experts of any model over ranks.

Where experts are, :mod:`drivetrain_moe.found` tells. The model's router stays as it is, and so does
the computation of an expert: the module's own forward computes this rank's experts.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from drivetrain.errors import ConfigError
from drivetrain_moe.exchange import way_of
from drivetrain_moe.found import Form, FoundExperts, find_experts, nothing_found
from drivetrain_moe.listed import ListedExperts
from drivetrain_moe.load import Load
from drivetrain_moe.section import EXPERT_PARALLEL, ExpertParallelSection
from drivetrain_moe.shared import BlockExperts, FusedExperts, SharedExperts

if TYPE_CHECKING:
    from drivetrain.job.job import Job
    from drivetrain_moe.axes import ExpertAxes

FORMS: dict[Form, type[SharedExperts]] = {
    "fused": FusedExperts,
    "blocks": BlockExperts,
    "listed": ListedExperts,
}


def share_out(
    job: Job,
    model: nn.Module,
    section: ExpertParallelSection,
    axes: ExpertAxes,
    *,
    halves: bool = False,
) -> nn.Module:
    """Leave each rank its part of the experts of every layer, and have tokens travel.

    Raises:
        ConfigError: there are no experts, their number does not divide, or a layer computes
            something else than it did before.
    """
    found = find_experts(model, section.expert_pattern)
    if not found:
        raise ConfigError(nothing_found(model))
    for experts in found:
        if experts.count % axes.size:
            raise ConfigError(
                f"{EXPERT_PARALLEL}.autoep_size: the {experts.count} experts of {experts.name} "
                f"cannot be shared out over {axes.size} ranks: {experts.count} / {axes.size} "
                f"leaves {experts.count % axes.size}"
            )
        load = Load(job, experts.name, experts.count, reports=True)
        shared = FORMS[experts.form](experts, load, section.bias_update_rate)
        if axes.size > 1:
            _refuse_shards(experts)
            shared.keep(job, axes, check=section.check)
            shared.way = way_of(job, experts.name, axes, experts.module, halves=halves)
        shared.take()
        job.on_close(shared.leave)
    return model


def _refuse_shards(found: FoundExperts) -> None:
    for name, parameter in found.module.named_parameters():
        if hasattr(parameter, "drivetrain_handle"):
            raise ConfigError(
                f"{EXPERT_PARALLEL}: {found.name}.{name} is sharded already (zero.Init), so it "
                "cannot be shared out by experts: build the model under torch.device('meta')"
            )
