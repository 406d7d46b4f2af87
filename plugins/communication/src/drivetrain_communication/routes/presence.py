"""Which routes exist here: each rank looks for itself, then all come to one answer.

[Note: presence] What a route needs may be on some hosts only: a package, a library, shared memory.
A rank that lacks it would raise while the others wait for it in the route's first collective, or
measure a route that it does not take part in. So all ranks hear from all, over the job's own way,
before any opens a route. What only starts with all ranks (MPI) is started after that, and looked at
once more.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, get_args

import torch.distributed as dist

from drivetrain.contracts import Communicator, CommunicatorWrapper
from drivetrain.errors import ConfigError
from drivetrain_communication.routes.section import PATH, RouteName
from drivetrain_communication.routes.texts import texts_of_ranks

if TYPE_CHECKING:
    from drivetrain.job.job import Job

JOB, TWO_LEVELS = "job", "two_levels"

ROUTES: tuple[str, ...] = get_args(RouteName)


def missing(job: Job, inner: Communicator, routes: Sequence[str]) -> dict[str, str]:
    """Those of ``routes`` that do not exist on every rank, and why. Collective.

    Args:
        job: whose ranks they are.
        inner: the job's own way.
        routes: names, the same on all ranks.
    """
    found = {route: _on_any(route, job, inner) for route in dict.fromkeys(routes)}
    return {route: why for route, why in found.items() if why}


def require(job: Job, inner: Communicator, routes: Sequence[str]) -> None:
    """Make sure that ``routes`` exist on every rank. Collective.

    Raises:
        ConfigError: (on every rank, with the same text) one does not; says where and why.
    """
    for route, why in missing(job, inner, routes).items():
        raise ConfigError(f"{PATH}: there is no route {route!r} here: {why}")


def innermost(communicator: Communicator) -> Communicator:
    """What moves data where no decorator does."""
    return list(_layers(communicator))[-1]


def backend() -> str:
    """The name of the job's own backend; empty without process groups."""
    return str(dist.get_backend()) if dist.is_initialized() else ""


def _on_any(route: str, job: Job, inner: Communicator) -> str:
    """Why a route does not exist on some rank; empty if all have it."""
    if route in (JOB, TWO_LEVELS, backend()):
        return ""
    why = _joined(texts_of_ranks(job, inner, _own(route, job, inner)))
    if route != "mpi" or why:
        return why
    from drivetrain_communication.routes.mpi import load_mpi

    # It exists on all ranks, so it can be started, which may wait for all of them.
    return _joined(texts_of_ranks(job, inner, _error(lambda: load_mpi(job))))


def _own(route: str, job: Job, inner: Communicator) -> str:
    """Why a route does not exist on this rank; empty if it does."""
    if route == "shared_memory":
        if any(getattr(layer, "route", "") == route for layer in _layers(inner)):
            return ""
        return "ranks share memory on CPUs, with drivetrain-cpu and cpu.shared_memory"
    if route == "mpi":
        from drivetrain_communication.routes.mpi import find_mpi

        return _error(find_mpi)
    if route == "nccl":
        if job.device.type != "cuda":
            return f"NCCL moves tensors of GPUs, and this job is on {job.device.type}"
        return "" if dist.is_nccl_available() else "this torch has no NCCL"
    return "" if dist.is_gloo_available() else "this torch has no gloo"


def _joined(texts: Sequence[str]) -> str:
    """One text of those of all ranks, with the ranks where not all have the same to say."""
    if len(set(texts)) == 1:
        return texts[0]
    ranks: dict[str, list[int]] = {}
    for rank, text in enumerate(texts):
        ranks.setdefault(text, []).append(rank)
    return "; ".join(
        f"on {_named(who)} of {len(texts)}, {text}" for text, who in ranks.items() if text
    )


_SHOWN = 8
"""Ranks that a message names at most."""


def _named(ranks: Sequence[int]) -> str:
    if len(ranks) == 1:
        return f"rank {ranks[0]}"
    rest = f" and {len(ranks) - _SHOWN} more" if len(ranks) > _SHOWN else ""
    return f"ranks {', '.join(map(str, ranks[:_SHOWN]))}{rest}"


def _layers(communicator: Communicator) -> Iterator[Communicator]:
    """A communicator and all inside it."""
    found: Communicator | None = communicator
    while found is not None:
        yield found
        found = found.inner if isinstance(found, CommunicatorWrapper) else None


def _error(call: Callable[[], object]) -> str:
    """Why ``call`` failed; empty if it did not.

    Whatever a library raises is told to all: a rank that ended here would leave the others waiting.
    """
    try:
        call()
    except ConfigError as error:
        return str(error).removeprefix("route mpi: ")
    except Exception as error:  # noqa: BLE001 - every rank raises it, as a ConfigError
        return f"{type(error).__name__}: {error}"
    return ""
