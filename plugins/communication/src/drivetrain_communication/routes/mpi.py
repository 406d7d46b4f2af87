"""Collectives over MPI, through ``mpi4py``, of ranks that ``mpirun`` has started.

[Note: progress] MPI moves data while somebody calls it. A rank that waits for a collective of
another route calls nothing, so one that waits for *it* in MPI would wait for ever: A issues 1 (MPI)
and waits for it, then issues 2 (gloo); B issues both, and waits for 2 first. So one thread of each
process issues everything that goes to MPI, in the order of the calls, and asks until it is through.
"""

from __future__ import annotations

import atexit
import queue
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYetError
from dataclasses import replace
from functools import partial
from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch

from drivetrain.communication.overdue import LONG, Issued
from drivetrain.contracts import (
    DONE,
    Collective,
    Communicator,
    CommunicatorWrapper,
    Handle,
    Kind,
    Op,
)
from drivetrain.errors import CommunicationError, ConfigError
from drivetrain_communication.compress.handles import then

if TYPE_CHECKING:
    from drivetrain.job.job import Job

_TYPES = {
    torch.float32: "FLOAT",
    torch.float64: "DOUBLE",
    torch.int64: "INT64_T",
    torch.int32: "INT32_T",
    torch.int16: "INT16_T",
    torch.int8: "INT8_T",
    torch.uint8: "UINT8_T",
}
"""Dtypes that MPI reduces; any dtype is moved."""

_LARGEST = (1 << 31) - 1
"""Elements that a call of MPI before version 4 can count."""

_PAUSES = (0.0, 2e-5, 1e-3)
"""Seconds that the thread sleeps: never while something comes, then a little, then longer."""


def find_mpi() -> Any:
    """``mpi4py.MPI``, without starting MPI, which may wait for all ranks that mpirun has started.

    Raises:
        ConfigError: mpi4py or the library of an MPI is not there.
    """
    try:
        options = import_module("mpi4py").rc
        given = options.initialize
        options.initialize = False  # read when the module below is imported for the first time
        try:
            return import_module("mpi4py.MPI")
        finally:
            options.initialize = given
    except (ImportError, RuntimeError) as error:  # the second where there is no library of MPI
        raise ConfigError(
            f"route mpi: mpi4py cannot be used ({error}); install an MPI and "
            "drivetrain-communication[mpi]"
        ) from None


def load_mpi(job: Job) -> Any:
    """``mpi4py.MPI`` with MPI started, if it serves the ranks of ``job``. Collective.

    Raises:
        ConfigError: it is not there, it may not be called from threads, or MPI has not started
            these ranks.
    """
    mpi = find_mpi()
    if not mpi.Is_initialized():
        mpi.Init_thread(mpi.THREAD_MULTIPLE)
        atexit.register(_finalize, mpi)
    if mpi.Query_thread() < mpi.THREAD_SERIALIZED:
        raise ConfigError("route mpi: this MPI may be called from one thread only")
    size = mpi.COMM_WORLD.Get_size()
    if size != job.world_size:
        raise ConfigError(
            f"route mpi: MPI knows of {size} ranks and the job has {job.world_size}; start the "
            "ranks by mpirun, or leave this route out"
        )
    return mpi


def _finalize(mpi: Any) -> None:
    if not mpi.Is_finalized():
        mpi.Finalize()


class _Thread:
    """The thread that calls MPI; see [Note: progress]."""

    def __init__(self) -> None:
        self._calls: queue.SimpleQueue[tuple[Callable[[], Any], Future[None]] | None] = (
            queue.SimpleQueue()
        )
        self._thread = threading.Thread(target=self._run, name="drivetrain-mpi", daemon=True)
        self._thread.start()

    def issue(self, start: Callable[[], Any]) -> Future[None]:
        """Call ``start``, which returns requests, after all that were issued before."""
        future: Future[None] = Future()
        self._calls.put((start, future))
        return future

    def close(self) -> None:
        """End, whatever is still under way."""
        self._calls.put(None)
        self._thread.join()

    def _run(self) -> None:
        under_way: list[tuple[list[Any], Future[None], object]] = []
        idle = 0
        while True:
            try:
                # With nothing under way there is nothing to do but wait for the next call.
                call = self._calls.get(block=not under_way)
            except queue.Empty:
                left = [entry for entry in under_way if not _through(*entry[:2])]
                idle = 0 if len(left) < len(under_way) else idle + 1
                under_way = left
                time.sleep(_PAUSES[min(idle // 200, len(_PAUSES) - 1)])
                continue
            if call is None:
                return
            start, future = call
            idle = 0
            try:
                under_way.append((start(), future, start))  # which holds the tensors
            except Exception as error:  # noqa: BLE001 - whoever waits gets it
                future.set_exception(error)


def _through(requests: list[Any], future: Future[None]) -> bool:
    try:
        if not all(request.Test() for request in requests):
            return False
    except Exception as error:  # noqa: BLE001 - whoever waits gets it
        future.set_exception(error)
    else:
        future.set_result(None)
    return True


class _Pending:
    """The handle of what is under way in MPI.

    Args:
        future: done when it is through.
        keep: tensors that MPI reads or writes meanwhile.
        compare: called whenever it has not come for long.
        explain: makes our exception of MPI's.
    """

    def __init__(
        self,
        future: Future[None],
        keep: object,
        compare: Callable[[], None] | None,
        explain: Callable[[BaseException], CommunicationError],
    ) -> None:
        self._future, self._keep, self._compare = future, keep, compare
        self._explain = explain

    def wait(self) -> None:
        while True:
            try:
                self._future.result(LONG.total_seconds())
            except NotYetError:
                if self._compare is not None:
                    self._compare()
                continue
            except Exception as error:
                raise self._explain(error) from error
            self._keep = None
            return


class MpiCommunicator(CommunicatorWrapper):
    """Carries collectives of tensors in host memory over MPI; ``inner`` knows the axes.

    It does not carry all-reduces of bf16, fp16 and booleans, of which MPI knows none, nor more than
    2 GiB at a time; see :meth:`carries`.

    Args:
        inner: answers sizes and positions; carries nothing.
        job: whose ranks and failures they are.

    Raises:
        ConfigError: as :func:`load_mpi` does.
    """

    route = "mpi"

    def __init__(self, inner: Communicator, job: Job) -> None:
        super().__init__(inner)
        self._mpi = load_mpi(job)
        self._job = job
        self._thread = _Thread()
        numbers = self._now(lambda: self._mpi.COMM_WORLD.allgather(job.rank))
        self._places = {rank: place for place, rank in enumerate(numbers)}
        self._groups: dict[tuple[int, ...], Any] = {}
        self._issued: dict[tuple[int, ...], Issued | None] = {}

    @staticmethod
    def carries(c: Collective) -> bool:
        """Whether MPI can carry ``c``; all ranks come to the same answer."""
        if c.kind is Kind.ALL_REDUCE and c.input.dtype not in _TYPES:
            return False
        return all(tensor.nbytes <= _LARGEST for tensor in c.tensors)

    def run(self, collective: Collective) -> Handle:
        c = collective
        ranks = tuple(self._job.mesh.ranks(c.axis))
        flaw = c.flaw(len(ranks), self.rank(c.axis))
        if flaw is not None:
            raise CommunicationError(f"{c} ({len(ranks)} ranks): {flaw}")
        group = self._group(ranks)
        issued = self._issued[ranks]
        finish, carried = None, c
        if c.kind is Kind.REDUCE_SCATTER:
            # An exchange of slices that are added up here: it moves as much, in any dtype, and its
            # output may be a slice of its input, which MPI forbids.
            came = torch.empty_like(c.input)
            carried = replace(c, kind=Kind.ALL_TO_ALL, tensors=(came.view(-1), c.input.view(-1)))
            finish = partial(_reduce_rows, c.output.view(-1), came.view(len(ranks), -1), c.op)
        start = partial(self._start, carried, group, len(ranks))
        if issued is not None and c.kind is Kind.SEND_RECEIVE:
            for number, (tensor, peer) in enumerate(zip(c.tensors, c.peers, strict=True)):
                issued.message(tensor, peer, number < c.sends)
        needs = {} if issued is None else issued.note(c)
        compare = None if issued is None else partial(issued.compare, needs)
        explain = partial(self._job.explain, str(c))
        handle: Handle = _Pending(self._thread.issue(start), carried.tensors, compare, explain)
        if finish is not None:
            return then(handle, finish, asynchronous=c.asynchronous)
        if c.asynchronous:
            return handle
        handle.wait()
        return DONE

    def close(self) -> None:
        """Ask for nothing any more."""
        self._thread.close()
        self._groups.clear()

    def _now(self, call: Callable[[], Any]) -> Any:
        """What ``call`` returns, on the thread that may call MPI."""
        found: list[Any] = []

        def start() -> list[Any]:
            found.append(call())
            return []

        self._thread.issue(start).result()
        return found[0]

    def _group(self, ranks: tuple[int, ...]) -> Any:
        """The communicator of MPI for some ranks, made by them when it is first asked for."""
        if ranks not in self._groups:
            world = self._mpi.COMM_WORLD
            places = [self._places[rank] for rank in ranks]
            self._groups[ranks] = self._now(lambda: world.Create_group(world.group.Incl(places)))
            board = self._job.failures
            self._issued[ranks] = None if board is None else Issued.of(board, self._job.rank, ranks)
        return self._groups[ranks]

    def _start(self, c: Collective, group: Any, size: int) -> list[Any]:
        """MPI's requests."""
        mpi = self._mpi
        match c.kind:
            case Kind.ALL_REDUCE:
                return [group.Iallreduce(mpi.IN_PLACE, self._typed(c.output), self._op(c))]
            case Kind.ALL_GATHER:
                own = mpi.IN_PLACE if _overlap(c.input, c.output) else self._bytes(c.input)
                return [group.Iallgather(own, self._bytes(c.output))]
            case Kind.BROADCAST:
                return [group.Ibcast(self._bytes(c.output), root=c.peer)]
            case Kind.ALL_TO_ALL:
                return [
                    group.Ialltoallv(
                        self._rows(c.input, c.input_splits, size),
                        self._rows(c.output, c.output_splits, size),
                    )
                ]
            case Kind.SEND_RECEIVE:
                pairs = list(zip(c.tensors, c.peers, strict=True))
                came = [group.Irecv(self._bytes(t), source=p) for t, p in pairs[c.sends :]]
                return came + [group.Isend(self._bytes(t), dest=p) for t, p in pairs[: c.sends]]
            case Kind.BARRIER:
                return [group.Ibarrier()]
        raise AssertionError(f"{c.kind} is made of another one")

    def _op(self, c: Collective) -> Any:
        return {Op.SUM: self._mpi.SUM, Op.MAX: self._mpi.MAX, Op.MIN: self._mpi.MIN}[c.op]

    def _typed(self, tensor: torch.Tensor) -> list[Any]:
        return [tensor.view(-1).numpy(), getattr(self._mpi, _TYPES[tensor.dtype])]

    def _bytes(self, tensor: torch.Tensor) -> list[Any]:
        return [tensor.reshape(-1).view(torch.uint8).numpy(), self._mpi.BYTE]

    def _rows(self, tensor: torch.Tensor, splits: Sequence[int] | None, size: int) -> list[Any]:
        """Bytes of a tensor with how many go to, or come from, each rank."""
        if splits is None:
            counts = [tensor.nbytes // size] * size
        else:
            row = tensor.nbytes // max(1, tensor.shape[0])
            counts = [rows * row for rows in splits]
        return [*self._bytes(tensor)[:1], counts, self._mpi.BYTE]


def _overlap(part: torch.Tensor, whole: torch.Tensor) -> bool:
    start, begin = part.data_ptr(), whole.data_ptr()
    return part.numel() > 0 and begin <= start < begin + whole.nbytes


def _reduce_rows(output: torch.Tensor, rows: torch.Tensor, op: Op) -> None:
    """Reduce ``rows`` [ranks, n] into ``output`` [n]; low precision in fp32."""
    if op is Op.SUM:
        torch.sum(rows, dim=0, dtype=rows.dtype, out=output)
    else:
        (torch.amax if op is Op.MAX else torch.amin)(rows, dim=0, out=output)
