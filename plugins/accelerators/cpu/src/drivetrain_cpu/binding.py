"""Which cores a rank runs on, and with how many threads."""

from __future__ import annotations

import os
from collections.abc import Collection, Mapping, Sequence
from functools import cache
from pathlib import Path

from drivetrain.errors import ConfigError

_TOPOLOGY = Path("/sys/devices/system/cpu")

Core = tuple[int, ...]
"""The CPU numbers of one core: one per hardware thread."""


def cores_of(cpus: Collection[int], topology: Path = _TOPOLOGY) -> list[Core]:
    """Group CPU numbers by core, in the order of sockets and of cores on them.

    CPUs whose place is unknown count as cores of their own.
    """
    places: dict[tuple[int, int], list[int]] = {}
    for cpu in sorted(cpus):
        folder = topology / f"cpu{cpu}" / "topology"
        try:
            socket = int((folder / "physical_package_id").read_text())
            core = int((folder / "core_id").read_text())
        except (OSError, ValueError):
            socket, core = -1, cpu
        places.setdefault((socket, core), []).append(cpu)
    return [tuple(places[place]) for place in sorted(places)]


def share(cores: Sequence[Core], local_rank: int, ranks: int) -> Sequence[Core]:
    """The cores of one rank: neighbours, as many for each rank as the division allows."""
    return cores[local_rank * len(cores) // ranks : (local_rank + 1) * len(cores) // ranks]


def wants_binding(setting: bool | str, cores: Sequence[Core], ranks: int) -> bool:
    """Whether ranks are to be bound.

    Raises:
        ConfigError: binding is asked for, but there are more ranks than cores, or the system has
            no such thing.
    """
    possible = hasattr(os, "sched_setaffinity")
    if setting is True:
        if not possible:
            raise ConfigError("cpu.bind_cores: true, but this system cannot bind processes")
        if ranks > len(cores):
            raise ConfigError(
                f"cpu.bind_cores: true, but {ranks} ranks share the {len(cores)} cores of this "
                "host; use fewer ranks or cpu.bind_cores: false"
            )
    if setting == "auto":
        return possible and 1 < ranks <= len(cores) and not _bound_by_launcher()
    return bool(setting)


def number_of_threads(
    setting: int | str, cores: Sequence[Core], ranks: int, environment: Mapping[str, str]
) -> int:
    """Threads of one rank, one per core and at least one.

    torchrun sets ``OMP_NUM_THREADS=1`` for several ranks unless it is set; that is no wish.
    """
    if isinstance(setting, int):
        return setting
    wish = environment.get("OMP_NUM_THREADS", "")
    from_torchrun = wish == "1" and "TORCHELASTIC_RUN_ID" in environment
    if wish.isdecimal() and int(wish) > 0 and not from_torchrun:
        return int(wish)
    return max(1, len(cores) // ranks)


@cache
def inherited_cpus() -> tuple[int, ...]:
    """The CPUs that this process could use at first, before anybody here has bound it."""
    if hasattr(os, "sched_getaffinity"):
        return tuple(sorted(os.sched_getaffinity(0)))
    return tuple(range(os.cpu_count() or 1))


def _bound_by_launcher() -> bool:
    """Whether this process may use fewer CPUs than the one that started it."""
    try:
        return set(inherited_cpus()) < os.sched_getaffinity(os.getppid())
    except OSError:  # the parent is in another container or belongs to somebody else
        return False
