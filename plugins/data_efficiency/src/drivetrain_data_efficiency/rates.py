"""Factors on the learning rate of one step: by layer tokens, and by the samples of its batch."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from drivetrain_data_efficiency.routing.random_ltd import of_job

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine
    from drivetrain_data_efficiency.section import DataEfficiencySection


@contextmanager
def scaled_rates(engine: Engine, section: DataEfficiencySection) -> Iterator[None]:
    """Scale every group's rate during an update, then set back what the schedule has set.

    So schedules, and what is saved of them, know nothing of the factors.
    """
    factor = 1.0
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
