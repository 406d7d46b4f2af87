"""Jobs of core alone, whose collectives go by gloo."""

from __future__ import annotations

from typing import Any

import torch

from drivetrain.contracts import Purpose, Tag
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry, core_entries
from drivetrain.testing.parts import SharedSequences

TAG = Tag(Purpose.CONTROL, site="test")


def plan(world: int | None = None, **config: Any) -> Plan:
    return Plan.build(
        config,
        world_size=world,
        batch_required=False,
        registry=Registry(core_entries()).with_plugins(SharedSequences),
    )


def total(job: Job, axis: str = "world") -> float:
    x = torch.tensor([1.0 + job.rank], device=job.device)
    job.communicator.all_reduce(x, axis, TAG)
    return x.item()
