"""Memory that ranks of one host share, in a job of tensors without memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING, Protocol

import torch

from drivetrain.contracts import (
    CommunicatorLayer,
    CommunicatorPhase,
    CommunicatorWrapper,
    Kind,
)
from drivetrain.plan.registry import Registry

if TYPE_CHECKING:
    from drivetrain.contracts import Axis, Collective, Communicator, Handle
    from drivetrain.job.job import Job

_THREADS = 2
"""That gloo's collectives run on, in turns (torch's default)."""


class Counter(Protocol):
    """Who counts memory is told of what is not simply this rank's own."""

    def shared_by(self, ranks: int) -> AbstractContextManager[None]:
        """Of memory that is made in the context each of so many ranks has one part."""

    def on_thread(self, number: int) -> AbstractContextManager[None]:
        """Memory that is made in the context comes from the heap of a thread, from 1 on."""

    def moment(self) -> int:
        """How many operators have run."""

    def alike(self, times: int) -> AbstractContextManager[None]:
        """Operators that run in the context are counted so many times."""


class RehearsedSharedMemory(CommunicatorWrapper):
    """Gives the memory that ranks of one host would share, and says as much of it as they would.

    Args:
        inner: the collectives, of ranks that do not exist.
        on_one_host: whether the ranks of an axis are several, and share memory.
        counter: is told of it.
    """

    def __init__(
        self, inner: Communicator, on_one_host: Callable[[Axis], bool], counter: Counter
    ) -> None:
        super().__init__(inner)
        self._on_one_host, self._counter = on_one_host, counter

    def joined_page(self, axis: Axis) -> int:
        return mmap.PAGESIZE if self._on_one_host(axis) else 0

    def joined_buffer(self, numel: int, dtype: torch.dtype, axis: Axis) -> torch.Tensor | None:
        if not self._on_one_host(axis):
            return None
        ranks = self.size(axis)
        with self._counter.shared_by(ranks):
            return torch.zeros(ranks * numel, dtype=dtype, device="meta")


class _Holding:
    """The handle of a collective that has memory of its own until it is waited for."""

    def __init__(self, handle: Handle, memory: torch.Tensor) -> None:
        self._handle, self._memory = handle, [memory]

    def wait(self) -> None:
        self._handle.wait()
        self._memory.clear()


class RehearsedGloo(CommunicatorWrapper):
    """Takes the memory that collectives between ranks take that share none.

    An all-gather of gloo's puts together a second whole, on one of its threads, whose heap keeps
    what it has had. A reduce-scatter receives the slices
    of all ranks before it adds them up (:mod:`drivetrain.communication.torch_communicator`). What
    others take, some MiB, is the same for all sizes.

    Args:
        inner: see :class:`RehearsedSharedMemory`.
        shares: whether the ranks of an axis share memory.
        counter: is told where it is.
    """

    def __init__(
        self, inner: Communicator, shares: Callable[[Axis], bool], counter: Counter
    ) -> None:
        super().__init__(inner)
        self._shares, self._counter, self._gathers = shares, counter, 0

    def run(self, collective: Collective) -> Handle:
        kind, axis = collective.kind, collective.axis
        takes = kind in (Kind.ALL_GATHER, Kind.REDUCE_SCATTER)
        if not takes or self.size(axis) == 1 or self._shares(axis):
            return super().run(collective)
        if kind is Kind.ALL_GATHER:
            self._gathers += 1
            with self._counter.on_thread(self._gathers % _THREADS + 1):
                memory = torch.empty_like(collective.output)
        else:
            memory = torch.empty_like(collective.input)
        handle = _Holding(super().run(collective), memory)
        del memory
        if not collective.asynchronous:
            handle.wait()
        return handle


def rehearsed_layers(job: Job, counter: Counter) -> list[CommunicatorLayer]:
    """The layers of a job on CPUs.

    Ranks of one host share memory if what does it is installed and not switched off.
    """
    hosts = job.ranks.ranks_on_host
    installed = Registry.installed().find("plugins", "cpu") is not None
    wanted = installed and job.plan.features().get("cpu.shared_memory", True)

    def on_one_host(axis: Axis) -> bool:
        ranks = job.mesh.ranks(axis)
        return bool(wanted) and len(ranks) > 1 and len({rank // hosts for rank in ranks}) == 1

    def wrap(inner: Communicator) -> Communicator:
        gloo = RehearsedGloo(inner, on_one_host, counter)
        return RehearsedSharedMemory(gloo, on_one_host, counter)

    return [CommunicatorLayer(CommunicatorPhase.ROUTE, wrap)]
