"""Let a kind of collective do nothing, to see what it costs: ``deepspeed.comm.torch``.

What a job communicates then is wrong, and so is what it trains. Collectives by which ranks agree
(whether a step overflowed, which buckets were late) go on, or ranks would part.
"""

from __future__ import annotations

import logging
from weakref import WeakKeyDictionary

from drivetrain.contracts import (
    DONE,
    Collective,
    Communicator,
    CommunicatorWrapper,
    Handle,
    Kind,
    Purpose,
)
from drivetrain.errors import CommunicationError
from drivetrain.job.job import Job, open_jobs

logger = logging.getLogger("deepspeed")


class _Silent(CommunicatorWrapper):
    """Passes over some kinds of collectives, whose tensors stay as they are.

    Args:
        inner: carries the others.

    Attributes:
        off: kinds that do nothing.
    """

    def __init__(self, inner: Communicator) -> None:
        super().__init__(inner)
        self.off: set[Kind] = set()

    def run(self, collective: Collective) -> Handle:
        if collective.kind in self.off and collective.tag.purpose is not Purpose.CONTROL:
            return DONE
        return super().run(collective)


_silent: WeakKeyDictionary[Job, _Silent] = WeakKeyDictionary()


def all_gather_comm_off(flag: bool = False) -> None:
    """Let all-gathers do nothing in all open jobs, or something again; see the module."""
    _switch("all_gather_comm_off", (Kind.ALL_GATHER,), flag)


def reduce_scatter_comm_off(flag: bool = False) -> None:
    """Let reduce-scatters do nothing in all open jobs, or something again; see the module."""
    _switch("reduce_scatter_comm_off", (Kind.REDUCE_SCATTER,), flag)


def broadcast_comm_off(flag: bool = False) -> None:
    """Let broadcasts do nothing in all open jobs, or something again; see the module."""
    _switch("broadcast_comm_off", (Kind.BROADCAST,), flag)


def all_reduce_comm_off(flag: bool = False) -> None:
    """Let all-reduces do nothing in all open jobs, or something again; see the module."""
    _switch("all_reduce_comm_off", (Kind.ALL_REDUCE,), flag)


def backward_comm_off(flag: bool = False) -> None:
    """Let what sums gradients do nothing in all open jobs, or something again; see the module."""
    _switch("backward_comm_off", (Kind.ALL_REDUCE, Kind.REDUCE_SCATTER), flag)


def _switch(name: str, kinds: tuple[Kind, ...], flag: bool) -> None:
    jobs = open_jobs()
    if not jobs:
        raise CommunicationError(f"{name} needs an open job: call deepspeed.initialize() first")
    for job in jobs:
        if job not in _silent:
            _silent[job] = _Silent(job.byte_log.inner)
            job.byte_log.inner = _silent[job]
        off = _silent[job].off
        off |= set(kinds)
        if not flag:
            off -= set(kinds)
    if flag:
        logger.warning("%s: the job trains something else from now on", name)
