"""This process's place among the ranks, and the default process group of torch."""

from __future__ import annotations

import atexit
import logging
import os
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from weakref import WeakKeyDictionary

import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d
from torch.distributed.distributed_c10d import PrefixStore, ProcessGroup, Store

from drivetrain.communication import aside
from drivetrain.communication.meeting import Meeting, store_host
from drivetrain.errors import CommunicationError, ConfigError

logger = logging.getLogger("drivetrain.process_group")

_END_SECONDS = 5.0
"""How long a process that fails or exits waits for its collectives to break."""


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


_worlds: WeakKeyDictionary[ProcessGroup, _World] = WeakKeyDictionary()


def start(
    backend: str, ranks: Ranks, *, timeout: timedelta | None = None, init_method: str | None = None
) -> None:
    """Start the default process group.

    Raises:
        CommunicationError: the ranks did not come together.
    """
    # No device is bound to the group: groups of some ranks could then only be split off by all.
    join = partial(
        dist.init_process_group,
        backend,
        init_method=init_method,
        timeout=timeout,
        rank=ranks.rank,
        world_size=ranks.world_size,
    )
    who = f"rank {ranks.rank} of {ranks.world_size}"
    try:
        if init_method is not None:
            join()
        elif ranks.world_size == 1:
            join(store=dist.HashStore())  # type: ignore[attr-defined]
        else:
            meeting = Meeting(ranks, timeout)
            who = str(meeting)
            store = meeting.come()
            who = str(meeting)
            meeting.join(partial(join, store=store))
    except (ValueError, RuntimeError) as error:
        reason = str(error).partition("\n")[0]
        if isinstance(error, dist.DistNetworkError):
            reason = f"no contact with the store, which {store_host()} hosts: {reason}"
        raise CommunicationError(
            f"{who} could not join the process group ({backend}): {reason}"
        ) from error
    if dist.group.WORLD is not None:
        _worlds.setdefault(dist.group.WORLD, _World(ours=False))


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
    world = _worlds.setdefault(dist.group.WORLD, _World(ours=False))
    world.ours = world.ours or ours
    aside.prepare()
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
            abandon() if _Exit.begun else dist.destroy_process_group()


def abandon() -> None:
    """End the process group whoever started it, so that ranks which wait for this one stop.

    A collective under way ends with the rank that it waits for; that may never end.
    """
    if dist.is_initialized() and not aside.within(_END_SECONDS, dist.destroy_process_group):
        logger.warning(
            "a collective is still under way after %.0f s, so the process group was left to itself",
            _END_SECONDS,
        )


class _Exit:
    """The end of the interpreter.

    gloo's threads let go of tensors after a collective is through. Where the interpreter has gone
    meanwhile, that ends the process with "terminate called without an active exception". So every
    group that was started here, or used by a job, is ended before; after whatever else is
    registered for the exit, as this module is loaded early.
    """

    begun = False

    @classmethod
    def end_groups(cls) -> None:
        cls.begun = True
        if dist.group.WORLD is not None and dist.group.WORLD in _worlds:
            abandon()


def exit_begins() -> None:
    """From here on, wait for nothing that may never come."""
    _Exit.begun = True


atexit.register(_Exit.end_groups)


def _number(variable: str, default: int) -> int:
    text = os.environ.get(variable, str(default))
    if not text.isdecimal():
        raise ConfigError(f"environment variable {variable} must be a number, got {text!r}")
    return int(text)
