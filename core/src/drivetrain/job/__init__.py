"""One process's part of a run before there is any model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from drivetrain.lazy import lazy_names

if TYPE_CHECKING:
    from drivetrain.job.job import Job as Job
    from drivetrain.job.job import init_distributed as init_distributed

__getattr__, __dir__, __all__ = lazy_names(
    __name__,
    {
        "job": "Job init_distributed",
    },
)
