"""Measure every route that exists here, and note the fastest for each collective and size."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import Axis, Kind
from drivetrain_communication.bench.measure import time_of
from drivetrain_communication.routes.presence import JOB, ROUTES, missing, require
from drivetrain_communication.routes.router import Router
from drivetrain_communication.routes.table import Table, cluster_of

if TYPE_CHECKING:
    from drivetrain.job.job import Job

_BETTER = 0.95
"""Share of the job's own time below which another route is taken: less is noise."""


def tune(
    job: Job,
    router: Router,
    axes: Sequence[Axis],
    kinds: Sequence[str],
    sizes: Sequence[int],
    seconds: float,
    wanted: Sequence[str] = (),
) -> Table:
    """Measure, and make the table. Collective over all ranks.

    Args:
        job: whose communicator it is.
        router: that of the job.
        axes: to measure; those whose shape has been measured are passed over.
        kinds: collectives.
        sizes: bytes of the whole tensor, ascending.
        seconds: about how long to measure each collective of each size and route.
        wanted: routes to try; all that exist here, if none are given.

    Raises:
        ConfigError: (on every rank) one of ``wanted`` does not exist on every rank.
    """
    require(job, router.inner, wanted)
    absent = missing(job, router.inner, ROUTES)
    names = [name for name in ROUTES if name not in absent]
    names = [name for name in names if not wanted or name in (JOB, *wanted)]
    table = Table(cluster_of(job, router.inner, router.hosts))
    seen = set()
    for axis in _with_levels(router, axes):
        shape = router.shape(axis)
        if shape.ranks == 1 or shape in seen:
            continue
        seen.add(shape)
        for kind in kinds:
            table.best[kind, shape] = []
            for size in sizes:
                times = _times(job, router, axis, Kind(kind), size, seconds, names)
                best = min(times, key=lambda name: times[name])
                if times[best] > _BETTER * times[JOB]:
                    best = JOB
                rows = table.best[kind, shape]
                if not rows or rows[-1][1] != best:
                    rows.append((size if rows else 0, best))
                table.measured.append(
                    {
                        "collective": kind,
                        "ranks": shape.ranks,
                        "hosts": shape.hosts,
                        "bytes": size,
                        "seconds": times,
                    }
                )
    return table


def _with_levels(router: Router, axes: Sequence[Axis]) -> Iterator[Axis]:
    """The axes, and the levels that their collectives are taken apart into."""
    for axis in axes:
        yield axis
        levels = router.levels_of(axis)
        if levels is not None:
            yield levels.inside
            yield levels.across


def _times(
    job: Job,
    router: Router,
    axis: Axis,
    kind: Kind,
    size: int,
    seconds: float,
    names: Sequence[str],
) -> dict[str, float]:
    """Seconds of each route that can carry it."""
    found = {}
    for name in names:
        router.forced = name
        try:
            if router.would_take(name, kind, axis, size):
                found[name] = time_of(job, axis, kind, size, torch.float32, seconds)
        finally:
            router.forced = None
    return found
