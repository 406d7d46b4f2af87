"""This process's place among the ranks, and the default process group of torch."""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store
from torch.distributed.rendezvous import rendezvous

from drivetrain.errors import CommunicationError, ConfigError


@dataclass(frozen=True)
class Ranks:
    """The place of one process in a job.

    Args:
        rank: of all ranks.
        world_size: number of ranks.
        local_rank: of the ranks on this host.
        ranks_on_host: how many those are.
    """

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    ranks_on_host: int = 1

    @classmethod
    def current(cls) -> Ranks:
        """As ``torch.distributed`` has it, else torchrun's environment, else a single process.

        Raises:
            ConfigError: the environment is incomplete or holds no numbers.
        """
        if dist.is_initialized():
            rank, world_size = dist.get_rank(), dist.get_world_size()
        else:
            world_size = _number("WORLD_SIZE", 1)
            if world_size > 1 and "RANK" not in os.environ:
                raise ConfigError(
                    f"WORLD_SIZE is {world_size} but RANK is not set: start the ranks with "
                    "torchrun or drivetrain run"
                )
            rank = _number("RANK", 0)
        # Without a launcher that says otherwise, all ranks are taken to be on this host.
        return cls(
            rank, world_size, _number("LOCAL_RANK", rank), _number("LOCAL_WORLD_SIZE", world_size)
        )


@dataclass
class _World:
    """Who uses the default process group.

    Args:
        ours: whether it was started for a job, so that the last job to close ends it.
        users: jobs that are open.
        jobs: jobs ever opened on it.
    """

    ours: bool
    users: int = 0
    jobs: int = 0


_servers: dict[str, tuple[Store, Iterator[int]]] = {}
"""Rendezvous address -> the store of this process there, and numbers for groups that meet in it."""

_worlds: WeakKeyDictionary[ProcessGroup, _World] = WeakKeyDictionary()


def init_distributed(
    dist_backend: str | None = None,
    *,
    timeout: timedelta | None = None,
    init_method: str | None = None,
    rank: int = -1,
    world_size: int = -1,
) -> None:
    """Start ``torch.distributed`` for a script that needs it before its first job.

    Jobs adopt the process group and leave it open. Does nothing when it is started already.

    Args:
        dist_backend: torch's backend string; by default that of the accelerator found here.
        timeout: of collectives.
        init_method: rendezvous URL; by default torchrun's environment, and without one a process
            group of one rank.
        rank: this process, where ``init_method`` does not say.
        world_size: number of ranks, where ``init_method`` does not say.

    Raises:
        ConfigError: the environment is incomplete.
        CommunicationError: the ranks did not come together.
    """
    if dist.is_initialized():
        return
    if dist_backend is None:
        from drivetrain.accelerator_choice import choose_accelerator

        dist_backend = choose_accelerator().communication_backend()
    here = Ranks(rank, world_size) if init_method is not None else Ranks.current()
    start(dist_backend, here, timeout=timeout, init_method=init_method)


def start(
    backend: str, ranks: Ranks, *, timeout: timedelta | None = None, init_method: str | None = None
) -> None:
    """Start the default process group.

    Raises:
        CommunicationError: the ranks did not come together.
    """
    # No device is bound to the group: groups of some ranks could then only be split off by all.
    try:
        dist.init_process_group(
            backend,
            init_method=init_method,
            timeout=timeout,
            rank=ranks.rank,
            world_size=ranks.world_size,
            store=_meeting_place(ranks) if init_method is None else None,
        )
    except (ValueError, RuntimeError) as error:
        raise CommunicationError(
            f"rank {ranks.rank} of {ranks.world_size} could not join the process group "
            f"({backend}): {error}"
        ) from error


def _meeting_place(ranks: Ranks) -> Store:
    """A store for one more process group of this process.

    The server behind it is found once and lives as long as the process. If every group brought its
    own, a rank that starts the next group early would talk to the server of the last one, which
    ends while it waits.
    """
    if ranks.world_size == 1:
        return dist.HashStore()  # type: ignore[attr-defined]
    address = f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}"
    if address not in _servers:
        _servers.clear()
        store, _, _ = next(rendezvous("env://", ranks.rank, ranks.world_size))
        _servers[address] = (store, count())
    store, generations = _servers[address]
    return PrefixStore(f"drivetrain/group{next(generations)}", store)


def enter(backend: str, ranks: Ranks, timeout: timedelta | None) -> Store | None:
    """Join the default process group for one job, starting it if need be.

    Returns:
        A store of this job alone; ``None`` where ranks cannot talk: for a single process, and for
        torch's fake process groups.
    """
    if ranks.world_size == 1 and not dist.is_initialized():
        return None
    ours = not dist.is_initialized()
    if ours:
        start(backend, ranks, timeout=timeout)
    assert dist.group.WORLD is not None
    world = _worlds.setdefault(dist.group.WORLD, _World(ours))
    world.users += 1
    world.jobs += 1
    if dist.get_backend() == "fake":
        return None
    return PrefixStore(f"drivetrain/job{world.jobs}", c10d._get_default_store())


def leave() -> None:
    """Undo :func:`enter`: the last job ends the process group if it was started for jobs."""
    world = _worlds.get(dist.group.WORLD) if dist.group.WORLD is not None else None
    if world is not None:
        world.users -= 1
        if world.users == 0 and world.ours:
            dist.destroy_process_group()


def abandon() -> None:
    """End the process group whoever started it, so that ranks which wait for this one stop."""
    if dist.is_initialized():
        dist.destroy_process_group()


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise ConfigError(f"environment variable {variable} must be a number, got {text!r}")
    return int(text)
