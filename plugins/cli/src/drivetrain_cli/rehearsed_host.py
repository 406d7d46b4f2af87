"""Memory that ranks of one host share, in a job of tensors without memory."""

from __future__ import annotations

import mmap
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import TYPE_CHECKING

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

SharedBy = Callable[[int], AbstractContextManager[None]]
"""Number of ranks -> context; of memory that is made in it each of them has one part."""


def nobody_asks(_ranks: int) -> AbstractContextManager[None]:
    """Where nobody counts memory."""
    return nullcontext()


class RehearsedSharedMemory(CommunicatorWrapper):
    """Gives the memory that ranks of one host would share, and says as much of it as they would.

    Args:
        inner: the collectives, of ranks that do not exist.
        on_one_host: whether the ranks of an axis are several, and share memory.
        shared_by: see :data:`SharedBy`.
    """

    def __init__(
        self, inner: Communicator, on_one_host: Callable[[Axis], bool], shared_by: SharedBy
    ) -> None:
        super().__init__(inner)
        self._on_one_host, self._shared_by = on_one_host, shared_by

    def joined_page(self, axis: Axis) -> int:
        return mmap.PAGESIZE if self._on_one_host(axis) else 0

    def joined_buffer(self, numel: int, dtype: torch.dtype, axis: Axis) -> torch.Tensor | None:
        if not self._on_one_host(axis):
            return None
        ranks = self.size(axis)
        with self._shared_by(ranks):
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

    An all-gather of gloo's puts together a second whole, and a reduce-scatter receives the slices
    of all ranks before it adds them up (:mod:`drivetrain.communication.torch_communicator`). What
    others take, some MiB, is the same for all sizes.

    Args:
        inner: see :class:`RehearsedSharedMemory`.
        shares: whether the ranks of an axis share memory.
    """

    def __init__(self, inner: Communicator, shares: Callable[[Axis], bool]) -> None:
        super().__init__(inner)
        self._shares = shares

    def run(self, collective: Collective) -> Handle:
        kind, axis = collective.kind, collective.axis
        takes = kind in (Kind.ALL_GATHER, Kind.REDUCE_SCATTER)
        if not takes or self.size(axis) == 1 or self._shares(axis):
            return super().run(collective)
        whole = collective.output if kind is Kind.ALL_GATHER else collective.input
        handle = _Holding(super().run(collective), torch.empty_like(whole))
        if not collective.asynchronous:
            handle.wait()
        return handle


def rehearsed_layers(job: Job, shared_by: SharedBy) -> list[CommunicatorLayer]:
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
        gloo = RehearsedGloo(inner, on_one_host)
        return RehearsedSharedMemory(gloo, on_one_host, shared_by)

    return [CommunicatorLayer(CommunicatorPhase.ROUTE, wrap)]
