"""The plugin: derives the batch sizes of a job from the number of ranks that it has now."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, ClassVar

from drivetrain.contracts import (
    ACCUMULATION,
    GLOBAL,
    MICRO,
    Batch,
    Plugin,
    Problem,
    Sections,
    hookimpl,
)
from drivetrain.errors import ConfigError
from drivetrain_elasticity.batches import solve
from drivetrain_elasticity.section import ElasticitySection

if TYPE_CHECKING:
    from drivetrain.plan.plan import Plan

SCHEDULER_VARIABLE = "DEEPSPEED_ELASTICITY_CONFIG"
"""The section as a scheduler has used it; the job's must not differ in what decides the batch."""

_AGREED = ("max_train_batch_size", "micro_batch_sizes", "version")


class Elasticity(Plugin):
    """Owns ``elasticity``."""

    name = "elasticity"
    sections: ClassVar[Sections] = {"elasticity": ElasticitySection}

    @hookimpl
    def configure(self, plan: Plan) -> Sequence[Problem]:
        section = self.section(ElasticitySection)
        problems = []
        given = [
            path
            for path in (GLOBAL, MICRO, ACCUMULATION)
            if plan.config.get(path) is not None and path not in plan.autos
        ]
        if given and not section.ignore_non_elastic_batch_info:
            stated = ", ".join(f"{path} {plan.config[path]}" for path in given)
            reason = (
                f"derives the batch sizes{_derived(section, plan)}, but the config gives {stated}: "
                "leave them out, or set ignore_non_elastic_batch_info to have them overruled"
            )
            problems.append(Problem("elasticity", reason))
        return [*problems, *_scheduler_problems(section)]

    @hookimpl
    def plan_batch(self, plan: Plan) -> Batch:
        shards = plan.layout.size("dp")
        section = self.section(ElasticitySection)
        ranks = shards * section.model_parallel_size
        found = solve(section, ranks)
        micro = found.micro_batch_size
        assert micro is not None, "a number of ranks was given"
        steps = found.train_batch_size // (micro * shards)
        return Batch(found.train_batch_size, micro, steps, shards)

    def features(self) -> Mapping[str, object]:
        return {"elasticity.enabled": self.section(ElasticitySection).enabled}


def _derived(section: ElasticitySection, plan: Plan) -> str:
    """The arithmetic, for messages; empty where nothing fits, which is another problem."""
    try:
        found = solve(section, plan.world_size)
    except ConfigError:
        return ""
    micro = found.micro_batch_size
    assert micro is not None, "a number of ranks was given"
    shards = plan.world_size // section.model_parallel_size
    steps = found.train_batch_size // (micro * shards)
    return (
        f" ({found.train_batch_size} = {micro} micro-batch x {steps} accumulation x {shards} "
        "data shards)"
    )


def _scheduler_problems(section: ElasticitySection) -> list[Problem]:
    text = os.environ.get(SCHEDULER_VARIABLE)
    if text is None:
        return []
    try:
        scheduled = ElasticitySection.model_validate(json.loads(text))
    except ValueError as error:
        return [Problem("elasticity", f"{SCHEDULER_VARIABLE} cannot be read: {error}")]
    return [
        Problem(
            f"elasticity.{name}",
            f"is {getattr(section, name)}, but the scheduler has planned with "
            f"{getattr(scheduled, name)} ({SCHEDULER_VARIABLE})",
        )
        for name in _AGREED
        if getattr(section, name) != getattr(scheduled, name)
    ]
