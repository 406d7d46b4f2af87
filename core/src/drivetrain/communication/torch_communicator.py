"""Collectives over ``torch.distributed``: the innermost communicator.

On the meta device a collective checks its arguments and does nothing else, so that a job of any
size can be walked through on one machine. Over axes of one rank no process group is needed.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist

from drivetrain.communication import aside
from drivetrain.communication.failure import broken
from drivetrain.communication.overdue import LONG, Issued
from drivetrain.contracts.world.axis import Axis
from drivetrain.contracts.world.collective import Collective, Kind, Op, is_float8
from drivetrain.contracts.world.communicator import DONE, Communicator, Handle
from drivetrain.errors import CommunicationError

if TYPE_CHECKING:
    from drivetrain.communication.failure import FailureBoard
    from drivetrain.communication.mesh import Mesh

_REDUCE_OPS = {Op.SUM: dist.ReduceOp.SUM, Op.MAX: dist.ReduceOp.MAX, Op.MIN: dist.ReduceOp.MIN}

# torch 2.13 renamed these two and warns of the old names; 2.11 has only those.
_all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
_reduce_scatter = getattr(dist, "reduce_scatter_single", dist.reduce_scatter_tensor)


@dataclass(frozen=True)
class _Line:
    """What a collective needs to know of its axis.

    Args:
        size: number of ranks along it.
        rank: this rank's position.
        group: process group; ``None`` for one rank and on the meta device.
        exchanges: whether reduce-scatter is an exchange and a local sum; see :func:`_exchange`.
        issued: what the ranks compare where the backend waits on the host; else ``None``.
    """

    size: int
    rank: int
    group: dist.ProcessGroup | None
    exchanges: bool
    issued: Issued | None


class _Messages:
    """Messages under way, which are waited for like one of torch's collectives.

    A thread waits for them where there is a limit: gloo closes the connection to a rank whose
    message has not come within one.
    """

    def __init__(self, works: Sequence[Any]) -> None:
        self._works = works
        self._arrival: Future[None] | None = None

    def wait(self, limit: timedelta | None = None) -> None:
        if limit is None and self._arrival is None:
            self._join()
            return
        if self._arrival is None:
            self._arrival = aside.begin(self._join)
        self._arrival.result(None if limit is None else limit.total_seconds())

    def is_completed(self) -> bool:
        return self._arrival is not None and self._arrival.done()

    def _join(self) -> None:
        for work in self._works:
            work.wait()


class _Pending:
    """A collective under way in torch.

    Args:
        work: torch's handle.
        finish: what remains to be done when the data has arrived.
        explain: makes our exception of torch's.
        overdue: called whenever it has not come for long.
    """

    def __init__(
        self,
        work: Any,
        finish: Callable[[], object] | None,
        explain: Callable[[BaseException], CommunicationError] | None,
        overdue: Callable[[], None] | None,
    ) -> None:
        self._work = work
        self._finish = finish
        self._explain = explain
        self._overdue = overdue

    def wait(self) -> None:
        if self._work is None:
            return
        try:
            while self._overdue is not None and not self._arrives_soon():
                self._overdue()
            self._work.wait()
        except RuntimeError as error:
            assert self._explain is not None
            raise self._explain(error) from error
        if self._finish is not None:
            self._finish()
        # Repeated waits are allowed and must not finish twice; tensors need not be held longer.
        self._work = self._finish = self._explain = None

    def _arrives_soon(self) -> bool:
        """Wait, but not for ever; true once it is through or broken."""
        try:
            self._work.wait(LONG)
        except (RuntimeError, TimeoutError):  # also if only the time is over
            return bool(self._work.is_completed())
        return True


class TorchCommunicator(Communicator):
    """Collectives over the process groups of a mesh.

    :meth:`run` raises :class:`CommunicationError`, naming collective, tag and axis, when tensors
    do not fit together or when the collective breaks; in the second case also the rank that failed
    and its error, where they are known.

    Args:
        mesh: the job's axes.
        device: where :meth:`buffer` allocates.
        failures: tells why a collective broke; ``None`` for a job of one rank.
    """

    def __init__(
        self, mesh: Mesh, device: torch.device, failures: FailureBoard | None = None
    ) -> None:
        self._mesh = mesh
        self._device = device
        self._failures = failures
        self._lines: dict[tuple[Axis, bool], _Line] = {}

    def size(self, axis: Axis) -> int:
        return self._mesh.size(axis)

    def rank(self, axis: Axis) -> int:
        return self._mesh.coordinate(axis)

    def run(self, collective: Collective) -> Handle:
        tensors = collective.tensors
        meta = tensors[0].is_meta if tensors else self._device.type == "meta"
        line = self._line(collective.axis, meta)
        flaw = collective.flaw(line.size, line.rank)
        if flaw is not None:
            raise CommunicationError(f"{self._title(collective)}: {flaw}")
        if line.group is not None:
            handle = self._issue(collective, line)
        else:
            handle = DONE
            if line.size == 1 and tensors:
                _copy(collective)
        if collective.kind is Kind.BARRIER and self._device.type not in ("cpu", "meta"):
            torch.get_device_module(self._device.type).synchronize()
        return handle

    def buffer(self, numel: int, dtype: torch.dtype, axis: Axis) -> torch.Tensor:
        return torch.zeros(numel, dtype=dtype, device=self._device)

    def close(self) -> None:
        """Let go of all process groups: while one is held, its connections stay open."""
        self._lines.clear()

    def _line(self, axis: Axis, meta: bool) -> _Line:
        line = self._lines.get((axis, meta))
        if line is None:
            group = None if meta else self._mesh.group(axis)
            on_host = group is not None and dist.get_backend(group) == dist.Backend.GLOO
            line = self._lines[axis, meta] = _Line(
                size=self._mesh.size(axis),
                rank=self._mesh.coordinate(axis),
                group=group,
                exchanges=on_host,
                issued=self._issued_on(axis) if on_host else None,
            )
        return line

    def _issued_on(self, axis: Axis) -> Issued | None:
        """What is issued on the ranks of ``axis``, under whatever name."""
        if self._failures is None:
            return None
        ranks = self._mesh.ranks(axis)
        return Issued.of(self._failures, ranks[self._mesh.coordinate(axis)], ranks)

    def _compare(self, issued: Issued, needs: dict[str, int]) -> None:
        try:
            issued.compare(needs)
        except CommunicationError:
            # Torch waits in the destructor of a group for what is under way, which never ends.
            for line in self._lines.values():
                ctypes.pythonapi.Py_IncRef(ctypes.py_object(line.group))
            raise

    def _issue(self, collective: Collective, line: _Line) -> Handle:
        explain = partial(self._explain, collective)
        try:
            work, finish = self._start(collective, line)
        except RuntimeError as error:
            raise explain(error) from error
        overdue = None
        if line.issued is not None:
            overdue = partial(self._compare, line.issued, line.issued.note(collective))
        pending = _Pending(work, finish, explain, overdue)
        if collective.asynchronous:
            return pending
        pending.wait()
        return DONE

    def _start(self, c: Collective, line: _Line) -> tuple[Any, Callable[[], object] | None]:
        """Torch's handle, and what remains to be done when it is through."""
        how: dict[str, Any] = {"group": line.group, "async_op": True}
        match c.kind:
            case Kind.ALL_REDUCE:
                return dist.all_reduce(c.output, _REDUCE_OPS[c.op], **how), None
            case Kind.REDUCE_SCATTER:
                if line.exchanges:
                    return _exchange(c, line)
                return _reduce_scatter(c.output, c.input, _REDUCE_OPS[c.op], **how), None
            case Kind.ALL_GATHER:
                return _all_gather(_movable(c.output), _movable(c.input), **how), None
            case Kind.BROADCAST:
                return dist.broadcast(_movable(c.output), group_src=c.peer, **how), None
            case Kind.ALL_TO_ALL:
                how["output_split_sizes"] = _listed(c.output_splits)
                how["input_split_sizes"] = _listed(c.input_splits)
                return dist.all_to_all_single(_movable(c.output), _movable(c.input), **how), None
            case Kind.SEND_RECEIVE:
                return _Messages(dist.batch_isend_irecv(list(_operations(c, line)))), None
            case Kind.BARRIER:
                # An all-reduce works on every backend without being told a device.
                return dist.all_reduce(torch.zeros(1, device=self._device), **how), None

    def _title(self, collective: Collective) -> str:
        return f"{collective} ({self._mesh.size(collective.axis)} ranks)"

    def _explain(self, collective: Collective, error: BaseException) -> CommunicationError:
        """Our exception for torch's."""
        explain = broken if self._failures is None else self._failures.explain
        return explain(self._title(collective), error)


def _copy(collective: Collective) -> None:
    """What there is to do on an axis of one rank."""
    if collective.output.data_ptr() != collective.input.data_ptr():
        collective.output.view(-1).copy_(collective.input.view(-1))


def _exchange(c: Collective, line: _Line) -> tuple[Any, Callable[[], object]]:
    """Reduce-scatter as an exchange of slices, which are then added up here.

    gloo reduces the whole input on every rank and keeps a slice. This moves half as much, and adds
    bf16 and fp16 in fp32.
    """
    received = torch.empty_like(c.input)
    work = dist.all_to_all_single(received, c.input, group=line.group, async_op=True)
    return work, partial(_reduce_rows, c.output.view(-1), received.view(line.size, -1), c.op)


def _operations(c: Collective, line: _Line) -> Iterator[dist.P2POp]:
    """Torch's words for messages; one alone too, as NCCL connects ranks otherwise outside of a
    batch, and the other side may have it in one.
    """
    for number, (tensor, peer) in enumerate(zip(c.tensors, c.peers, strict=True)):
        sent = number < c.sends
        tag = 0 if line.issued is None else line.issued.message(tensor, peer, sent)
        way = dist.isend if sent else dist.irecv
        yield dist.P2POp(way, _movable(tensor), None, line.group, tag, group_peer=peer)


def _listed(splits: Sequence[int] | None) -> list[int] | None:
    return None if splits is None else list(splits)


def _movable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or its bytes where gloo does not know the dtype."""
    return tensor.view(torch.uint8) if is_float8(tensor.dtype) else tensor


def _reduce_rows(output: torch.Tensor, rows: torch.Tensor, op: Op) -> None:
    """Reduce ``rows`` [ranks, n] into ``output`` [n]."""
    if op is Op.SUM:
        torch.sum(rows, dim=0, dtype=rows.dtype, out=output)
    else:
        (torch.amax if op is Op.MAX else torch.amin)(rows, dim=0, out=output)
