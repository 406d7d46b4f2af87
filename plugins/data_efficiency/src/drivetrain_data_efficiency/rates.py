"""Factors on the learning rate of a step: by what was consumed, and by its batch's samples."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING
from weakref import WeakKeyDictionary

from drivetrain_data_efficiency.decay import rate_at
from drivetrain_data_efficiency.routing.random_ltd import of_job

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job
    from drivetrain_data_efficiency.section import DataEfficiencySection, RateSchedule

packed_until: WeakKeyDictionary[Job, dict[str, int]] = WeakKeyDictionary()
"""Samples and tokens of a job's steps, where micro-batches are made by tokens."""


@contextmanager
def scaled_rates(engine: Engine, section: DataEfficiencySection) -> Iterator[None]:
    """Scale every group's rate during an update, then set back what the schedule has set.

    So schedules, and what is saved of them, know nothing of the factors.
    """
    factor = 1.0 if section.rate is None else consumed_factor(engine, section, section.rate)
    dropping = of_job.get(engine.job) if section.dropping is not None else None
    if dropping is not None:
        factor *= dropping.rate_factor()
    if section.batching is not None:
        from drivetrain_data_efficiency.sampling.token_batches import rate_factor

        factor *= rate_factor(engine, section.batching)
    assert engine.optimizer is not None
    groups = engine.optimizer.param_groups if factor != 1.0 else []
    before = [group["lr"] for group in groups]
    for group in groups:
        group["lr"] = group["lr"] * factor
    try:
        yield
    finally:
        for group, rate in zip(groups, before, strict=True):
            group["lr"] = rate
    if dropping is not None:
        dropping.end_step()
    if section.batching is not None:
        _count_packed(engine)


def consumed_factor(engine: Engine, section: DataEfficiencySection, rate: RateSchedule) -> float:
    """The factor of the step under way by what was consumed before it, alike on all ranks.

    Where micro-batches are made by tokens, ranks have different numbers of them, and core counts a
    micro-batch as one sample. So samples and tokens are then those of the order, which all know.
    """
    assert rate.total is not None
    if section.batching is not None and rate.by != "steps":
        done = packed_until.get(engine.job, {}).get(rate.by, 0)
    else:
        done = getattr(engine.progress, rate.by)
    return rate_at(done, total=rate.total, warmup=rate.warmup, decay=rate.decay_type)


def _count_packed(engine: Engine) -> None:
    from drivetrain_data_efficiency.sampling.token_batches import step_under_way

    found = step_under_way(engine)
    if found is not None:
        counts = packed_until.setdefault(engine.job, {"samples": 0, "tokens": 0})
        counts["samples"] += found[0]
        counts["tokens"] += found[1]
