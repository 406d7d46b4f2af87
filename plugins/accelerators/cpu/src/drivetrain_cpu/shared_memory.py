"""Collectives between ranks of one host through shared memory, in place of the network.

A decorator of the communicator: collectives over an axis whose ranks all run on this host, with
tensors in host memory, go through :class:`SharedGroup`; everything else goes on to the communicator
inside (gloo). An axis shares memory from its first collective on.
"""

from __future__ import annotations

import ctypes
import logging
import os
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from functools import partial
from typing import TYPE_CHECKING

import torch

from drivetrain.communication.failure import broken
from drivetrain.communication.overdue import Issued
from drivetrain.contracts import (
    DONE,
    Collective,
    Communicator,
    CommunicatorLayer,
    CommunicatorPhase,
    CommunicatorWrapper,
    Handle,
    Kind,
)
from drivetrain.errors import BuildError, CommunicationError
from drivetrain_cpu.instruction_sets import selected
from drivetrain_cpu.kernels import kernel_library
from drivetrain_cpu.shared_group import SLOT_BYTES, Fault, SharedGroup, UnavailableError
from drivetrain_cpu.shared_segment import PAGE

if TYPE_CHECKING:
    from drivetrain.contracts import Axis
    from drivetrain.job.job import Job
    from drivetrain_cpu.shared_mail import Letters

logger = logging.getLogger("drivetrain.cpu")

TIMEOUT = 1800.0
"""Seconds after which a rank that is alive but does not come counts as lost, as in gloo."""

Explain = Callable[[str, BaseException], CommunicationError]


class _Pending:
    """The handle of a collective that runs on the axis's thread."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        try:
            self._future.result()
        except CancelledError:
            raise CommunicationError("the communicator was closed before its turn came") from None


class _Line:
    """One axis that shares memory, and the order of its collectives.

    Synchronous collectives run on the caller's thread. Asynchronous ones run on a thread of the
    axis, so that ranks may interleave axes differently; one that is issued behind them follows
    them there.
    """

    def __init__(self, group: SharedGroup, ranks: Sequence[int], explain: Explain) -> None:
        self.group = group
        self._ranks = tuple(ranks)
        self._explain = explain
        self._thread: ThreadPoolExecutor | None = None
        self._last: Future[None] | None = None

    def run(self, collective: Collective) -> Handle:
        """Run ``collective`` after all that were issued before."""
        issued = self.group.issued
        needs = {} if issued is None else issued.note(collective)
        busy = self._last is not None and not self._last.done()
        if not collective.asynchronous and not busy:
            self._checked(collective, needs, patient=True)
            return DONE
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="drivetrain-shared-memory")
        self._last = self._thread.submit(self._checked, collective, needs)
        handle = _Pending(self._last)
        if not collective.asynchronous:
            handle.wait()
        return handle

    def send_receive(self, collective: Collective) -> Handle:
        """Send at once, on the caller's thread; messages have an order of their own."""
        letters = self.group.messages(collective)
        handle = _Arriving(letters, partial(self._check, collective))
        self._check(collective, letters.fault)
        if not collective.asynchronous:
            handle.wait()
        return handle

    def close(self) -> None:
        """Leave the group."""
        self.group.close()
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)

    def _checked(
        self, collective: Collective, needs: dict[str, int], *, patient: bool = False
    ) -> None:
        self.group.begin_wait(needs)
        fault = self.group.run(collective, patient=patient)
        self.group.end_wait()
        self._check(collective, fault)

    def _check(self, collective: Collective, fault: Fault | None) -> None:
        if fault is not None:
            rank = self._ranks[fault.position]
            raise self._explain(str(collective), CommunicationError(f"rank {rank} {fault.what}"))


class _Arriving:
    """The handle of messages that are under way.

    Args:
        letters: what is to come.
        check: raises what went wrong.
    """

    def __init__(self, letters: Letters, check: Callable[[Fault | None], None]) -> None:
        self._letters, self._check = letters, check

    def wait(self) -> None:
        self._check(self._letters.wait())


class SharedMemoryCommunicator(CommunicatorWrapper):
    """Routes collectives of ranks on one host through shared memory.

    Args:
        inner: carries what cannot be routed, and the set-up.
        library: answers the native kernels; asked at the first collective.
        ranks: answers the global ranks along an axis, for messages.
        explain: makes the exception of a collective that broke, from what it was and how it broke.
        timeout: seconds after which a rank that does not come counts as lost.
        slot_bytes: size of a staging slot, the same on all ranks.
        broken_off: asked by a rank that has waited for long whether the job has failed.
        issued: answers what given ranks compare when they wait for long, if they can.
    """

    route = "shared_memory"

    def __init__(
        self,
        inner: Communicator,
        library: Callable[[], ctypes.CDLL],
        ranks: Callable[[Axis], Sequence[int]],
        timeout: float = TIMEOUT,
        explain: Explain = broken,
        slot_bytes: int = SLOT_BYTES,
        broken_off: Callable[[], bool] | None = None,
        issued: Callable[[Sequence[int]], Issued | None] = lambda _ranks: None,
    ) -> None:
        super().__init__(inner)
        self._slot_bytes, self._broken_off, self._issued = slot_bytes, broken_off, issued
        self._library, self._ranks, self._timeout = library, ranks, timeout
        self._explain = explain
        self._opened: dict[tuple[int, ...], _Line | None] = {}
        self._lines: dict[Axis, _Line | None] = {}
        self._without_buffers: set[Axis] = set()
        self._closed = False

    def close(self) -> None:
        """Leave all groups, so that ranks that wait for this one fail instead of waiting on."""
        for line in self._opened.values():
            if line is not None:
                line.close()
        self._opened.clear()
        self._lines.clear()
        self._closed = True

    def run(self, collective: Collective) -> Handle:
        line = self._line(collective.axis)
        if line is None or not line.group.serves(collective):
            return super().run(collective)
        if collective.kind is Kind.SEND_RECEIVE:
            return line.send_receive(collective)
        if collective.settled and line.group.read(collective):
            return DONE
        return line.run(collective)

    def reads_settled(self, input: torch.Tensor, axis: Axis) -> bool:
        line = self._line(axis)
        return line is not None and line.group.is_registered(input)

    def buffer(self, numel: int, dtype: torch.dtype, axis: Axis) -> torch.Tensor:
        line = self._line(axis)
        if line is not None:
            try:
                return line.group.buffer(numel, dtype)
            except UnavailableError as reason:
                self._note_no_buffers(axis, line, reason)
        return super().buffer(numel, dtype, axis)

    def joined_page(self, axis: Axis) -> int:
        return PAGE if self._line(axis) is not None else 0

    def joined_buffer(self, numel: int, dtype: torch.dtype, axis: Axis) -> torch.Tensor | None:
        line = self._line(axis)
        if line is None:
            return None
        try:
            return line.group.joined(numel, dtype)
        except UnavailableError as reason:
            self._note_no_buffers(axis, line, reason)
            return None

    def _note_no_buffers(self, axis: Axis, line: _Line, reason: UnavailableError) -> None:
        if line.group.rank == 0 and axis not in self._without_buffers:
            self._without_buffers.add(axis)
            logger.warning("buffers over axis %r are in ordinary memory: %s", axis, reason)

    def _line(self, axis: Axis) -> _Line | None:
        """The shared memory of an axis; ``None`` where its ranks cannot share any."""
        if axis not in self._lines:
            self._lines[axis] = self._line_of(tuple(self._ranks(axis)), axis)
        return self._lines[axis]

    def _line_of(self, ranks: tuple[int, ...], axis: Axis) -> _Line | None:
        if len(ranks) == 1:
            return None
        if self._closed:
            raise CommunicationError(f"the communicator is closed; axis {axis!r} was asked for")
        if ranks not in self._opened:
            self._opened[ranks] = self._open(axis, ranks)
        return self._opened[ranks]

    def _open(self, axis: Axis, ranks: Sequence[int]) -> _Line | None:
        library: ctypes.CDLL | str
        try:
            library = self._library()
        except BuildError as error:
            if os.environ.get("DRIVETRAIN_REQUIRE_NATIVE") == "1":
                raise
            # The other ranks have to hear of it, or they would wait for this one.
            library = str(error)
        try:
            group = SharedGroup(
                library,
                self.inner,
                axis,
                self._timeout,
                self._slot_bytes,
                self._broken_off,
                self._issued(ranks),
            )
        except UnavailableError as reason:
            if self.rank(axis) == 0:
                logger.warning("axis %r does not communicate through memory: %s", axis, reason)
            return None
        return _Line(group, ranks, self._explain)


def share_memory(job: Job) -> Sequence[CommunicatorLayer]:
    """The layer for a job on CPUs: what the accelerator answers to ``wrap_communicator``."""
    if job.device.type != "cpu" or job.world_size == 1:
        return ()

    def broken_off() -> bool:
        try:
            if job.failures is not None:
                job.failures.check("waiting in shared memory")
        except CommunicationError:
            return True
        return False

    def issued(ranks: Sequence[int]) -> Issued | None:
        board = job.failures
        return None if board is None else Issued.of(board, job.rank, ranks)

    def wrap(communicator: Communicator) -> Communicator:
        routed = SharedMemoryCommunicator(
            communicator,
            native_library,
            job.mesh.ranks,
            explain=job.explain,
            broken_off=broken_off,
            issued=issued,
        )
        job.on_close(routed.close)
        return routed

    return (CommunicatorLayer(CommunicatorPhase.ROUTE, wrap),)


def native_library() -> ctypes.CDLL:
    """The kernels of the path that this machine runs best."""
    return kernel_library(selected()).load()
