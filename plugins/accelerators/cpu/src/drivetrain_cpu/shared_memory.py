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
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING

import torch

from drivetrain.communicator import (
    Communicator,
    CommunicatorLayer,
    CommunicatorPhase,
    Handle,
    Op,
    Tag,
)
from drivetrain.communicator_wrapper import CommunicatorWrapper
from drivetrain.errors import BuildError, CommunicationError
from drivetrain.failure import broken
from drivetrain_cpu.instruction_sets import selected
from drivetrain_cpu.kernels import kernel_library
from drivetrain_cpu.shared_group import REDUCED, Fault, SharedGroup, UnavailableError

if TYPE_CHECKING:
    from drivetrain.job import Job
    from drivetrain.mesh_layout import Axis

logger = logging.getLogger("drivetrain.cpu")

TIMEOUT = 1800.0
"""Seconds after which a rank that is alive but does not come counts as lost, as in gloo."""

Collective = Callable[[], Fault | None]

Explain = Callable[[str, BaseException], CommunicationError]


class _Done:
    """The handle of a collective that is finished."""

    def wait(self) -> None:
        pass


_DONE = _Done()


class _Pending:
    """The handle of a collective that runs on the axis's thread."""

    def __init__(self, future: Future[None]) -> None:
        self._future = future

    def wait(self) -> None:
        self._future.result()


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

    def issue(self, collective: Collective, title: str, asynchronous: bool) -> Handle:
        """Run ``collective`` after all that were issued before."""
        busy = self._last is not None and not self._last.done()
        if not asynchronous and not busy:
            self._checked(collective, title)
            return _DONE
        if self._thread is None:
            self._thread = ThreadPoolExecutor(1, thread_name_prefix="drivetrain-shared-memory")
        self._last = self._thread.submit(self._checked, collective, title)
        handle = _Pending(self._last)
        if not asynchronous:
            handle.wait()
        return handle

    def close(self) -> None:
        """Leave the group."""
        self.group.leave()
        if self._thread is not None:
            self._thread.shutdown(wait=False, cancel_futures=True)
        if self._last is None or self._last.done():
            self.group.close()

    def _checked(self, collective: Collective, title: str) -> None:
        fault = collective()
        if fault is not None:
            rank = self._ranks[fault.position]
            raise self._explain(title, CommunicationError(f"rank {rank} {fault.what}"))


class SharedMemoryCommunicator(CommunicatorWrapper):
    """Routes collectives of ranks on one host through shared memory.

    Args:
        inner: carries what cannot be routed, and the set-up.
        library: answers the native kernels; asked at the first collective.
        ranks: answers the global ranks along an axis, for messages.
        explain: makes the exception of a collective that broke, from what it was and how it broke.
        timeout: seconds after which a rank that does not come counts as lost.
    """

    def __init__(
        self,
        inner: Communicator,
        library: Callable[[], ctypes.CDLL],
        ranks: Callable[[Axis], Sequence[int]],
        timeout: float = TIMEOUT,
        explain: Explain = broken,
    ) -> None:
        super().__init__(inner)
        self._library, self._ranks, self._timeout = library, ranks, timeout
        self._explain = explain
        self._lines: dict[tuple[int, ...], _Line | None] = {}
        self._closed = False

    def close(self) -> None:
        """Leave all groups, so that ranks that wait for this one fail instead of waiting on."""
        for line in self._lines.values():
            if line is not None:
                line.close()
        self._lines.clear()
        self._closed = True

    def all_reduce(
        self,
        tensor: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        op: Op = Op.SUM,
        asynchronous: bool = False,
    ) -> Handle:
        line = self._line(axis, tensor, reduces=True)
        if line is None:
            return super().all_reduce(tensor, axis, tag, op=op, asynchronous=asynchronous)
        group = line.group
        title = _title("all_reduce", tag, axis)
        return line.issue(lambda: group.all_reduce(tensor, op), title, asynchronous)

    def reduce_scatter(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        op: Op = Op.SUM,
        asynchronous: bool = False,
    ) -> Handle:
        fits = _fit(whole=input, part=output, size=self.size(axis))
        line = self._line(axis, input, output, reduces=True) if fits else None
        if line is None:
            return super().reduce_scatter(
                output, input, axis, tag, op=op, asynchronous=asynchronous
            )
        group, title = line.group, _title("reduce_scatter", tag, axis)
        return line.issue(lambda: group.reduce_scatter(output, input, op), title, asynchronous)

    def all_gather(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        asynchronous: bool = False,
    ) -> Handle:
        fits = _fit(whole=output, part=input, size=self.size(axis))
        line = self._line(axis, input, output) if fits else None
        if line is None:
            return super().all_gather(output, input, axis, tag, asynchronous=asynchronous)
        group, title = line.group, _title("all_gather", tag, axis)
        return line.issue(lambda: group.all_gather(output, input), title, asynchronous)

    def broadcast(
        self,
        tensor: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        source: int = 0,
        asynchronous: bool = False,
    ) -> Handle:
        exists = 0 <= source < self.size(axis)
        line = self._line(axis, tensor) if exists else None
        if line is None:
            return super().broadcast(tensor, axis, tag, source=source, asynchronous=asynchronous)
        group, title = line.group, _title("broadcast", tag, axis)
        return line.issue(lambda: group.broadcast(tensor, source), title, asynchronous)

    def all_to_all(
        self,
        output: torch.Tensor,
        input: torch.Tensor,
        axis: Axis,
        tag: Tag,
        *,
        output_splits: Sequence[int] | None = None,
        input_splits: Sequence[int] | None = None,
        asynchronous: bool = False,
    ) -> Handle:
        received = _bytes_of_splits(output, output_splits, self.size(axis))
        sent = _bytes_of_splits(input, input_splits, self.size(axis))
        fits = received is not None and sent is not None
        line = self._line(axis, input, output) if fits else None
        if line is None or received is None or sent is None:
            return super().all_to_all(
                output,
                input,
                axis,
                tag,
                output_splits=output_splits,
                input_splits=input_splits,
                asynchronous=asynchronous,
            )
        group, title = line.group, _title("all_to_all", tag, axis)
        return line.issue(
            lambda: group.all_to_all(output, input, received, sent), title, asynchronous
        )

    def barrier(self, axis: Axis, tag: Tag) -> None:
        line = self._line(axis)
        if line is None:
            super().barrier(axis, tag)
        else:
            line.issue(line.group.barrier, _title("barrier", tag, axis), False)

    def buffer(self, numel: int, dtype: torch.dtype, axis: Axis) -> torch.Tensor:
        line = self._line(axis)
        if line is not None:
            try:
                return line.group.buffer(numel, dtype)
            except UnavailableError as reason:
                _say("a buffer over axis %r is in ordinary memory: %s", axis, reason, line.group)
        return super().buffer(numel, dtype, axis)

    def _line(self, axis: Axis, *tensors: torch.Tensor, reduces: bool = False) -> _Line | None:
        """The shared memory to use; ``None`` for what the communicator inside has to do.

        It also refuses what does not fit together. Ranks decide alike, as long as they issue the
        same collective.
        """
        first = tensors[0] if tensors else None
        if first is not None:
            alike = all(t.dtype == first.dtype and t.is_contiguous() for t in tensors)
            local = all(t.device.type == "cpu" for t in tensors)
            if not (alike and local) or (reduces and first.dtype not in REDUCED):
                return None
        ranks = tuple(self._ranks(axis))
        if len(ranks) == 1:
            return None
        if self._closed:
            raise CommunicationError(f"the communicator is closed; axis {axis!r} was asked for")
        if ranks not in self._lines:
            self._lines[ranks] = self._open(axis, ranks)
        return self._lines[ranks]

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
            group = SharedGroup(library, self.inner, axis, self._timeout)
        except UnavailableError as reason:
            if self.rank(axis) == 0:
                logger.warning("axis %r does not communicate through memory: %s", axis, reason)
            return None
        return _Line(group, ranks, self._explain)


def share_memory(job: Job) -> Sequence[CommunicatorLayer]:
    """The layer for a job on CPUs: what the accelerator answers to ``wrap_communicator``."""
    if job.device.type != "cpu" or job.world_size == 1:
        return ()

    def wrap(communicator: Communicator) -> Communicator:
        # Below the byte log, which then counts what goes through memory like anything else.
        log = job.byte_log
        routed = SharedMemoryCommunicator(
            log.inner, native_library, job.mesh.ranks, explain=job.explain
        )
        log.inner = routed
        job.on_close(routed.close)
        return communicator

    return (CommunicatorLayer(CommunicatorPhase.ROUTE, wrap),)


def native_library() -> ctypes.CDLL:
    """The kernels of the path that this machine runs best."""
    return kernel_library(selected()).load()


def _say(message: str, axis: Axis, reason: UnavailableError, group: SharedGroup) -> None:
    if group.rank == 0:
        logger.warning(message, axis, reason)


def _title(what: str, tag: Tag, axis: Axis) -> str:
    return f"{what} of {tag} over {axis!r}"


def _fit(*, whole: torch.Tensor, part: torch.Tensor, size: int) -> bool:
    return whole.numel() == part.numel() * size


def _bytes_of_splits(
    tensor: torch.Tensor, splits: Sequence[int] | None, size: int
) -> list[int] | None:
    """Bytes for each rank; ``None`` where the tensor cannot be cut like that."""
    rows = tensor.shape[0] if tensor.dim() else 0
    if splits is None:
        return [tensor.nbytes // size] * size if rows and rows % size == 0 else None
    if len(splits) != size or sum(splits) != rows:
        return None
    row = tensor.nbytes // rows if rows else 0
    return [count * row for count in splits]
