"""Time collectives, through Drivetrain's communicator and through the backend's own calls.

Bandwidths are those of nccl-tests (https://github.com/NVIDIA/nccl-tests, doc/PERFORMANCE.md): the
*algorithm* bandwidth is the size of the tensor that a collective is about, by the time; the *bus*
bandwidth multiplies it by the part of that which each rank has to send or receive, so that numbers
of different collectives and numbers of ranks can be compared with what the hardware does.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
import torch.distributed as dist

from drivetrain.contracts import Axis, Kind, Op, Purpose, Tag

if TYPE_CHECKING:
    from drivetrain.job.job import Job

KINDS = (
    Kind.ALL_REDUCE,
    Kind.REDUCE_SCATTER,
    Kind.ALL_GATHER,
    Kind.ALL_TO_ALL,
    Kind.BROADCAST,
    Kind.SEND_RECEIVE,
)
"""What can be measured; a send-receive is a ring, in which each rank sends to the next."""

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}

# torch 2.13 renamed these two and warns of the old names; 2.11 has only those.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor

_TAG = Tag(Purpose.ACTIVATION, site="bench")
_WARM_UP = 3
_LEAST, _MOST = 5, 200


@dataclass(frozen=True)
class Row:
    """One collective of one size.

    Args:
        kind: which.
        nbytes: size of the whole tensor.
        seconds: median over calls of what the slowest rank took.
        backend_seconds: the same for the backend's own call; ``None`` if it was not measured.
        ranks: along the axis.
    """

    kind: str
    nbytes: int
    seconds: float
    backend_seconds: float | None
    ranks: int

    @property
    def algorithm_bandwidth(self) -> float:
        """Bytes per second of the whole tensor."""
        return self.nbytes / self.seconds

    @property
    def bus_bandwidth(self) -> float:
        """Bytes per second that each rank has to send or receive."""
        return self.algorithm_bandwidth * bus_factor(self.kind, self.ranks)


def bus_factor(kind: str, ranks: int) -> float:
    """Bus bandwidth over algorithm bandwidth."""
    if kind == Kind.ALL_REDUCE:
        return 2 * (ranks - 1) / ranks
    if kind in (Kind.BROADCAST, Kind.SEND_RECEIVE):
        return 1.0
    return (ranks - 1) / ranks


def sweep(
    job: Job,
    axis: Axis,
    kinds: Sequence[str],
    sizes: Sequence[int],
    dtype: torch.dtype,
    seconds: float,
) -> Iterator[Row]:
    """Measure each of ``kinds`` at each of ``sizes``. Collective over ``axis``.

    Args:
        job: communicator, mesh, device.
        axis: ranks that take part.
        kinds: see :data:`KINDS`.
        sizes: bytes of the whole tensor; rounded up so that ranks have equal slices.
        dtype: of its elements.
        seconds: about how long to measure each.
    """
    ranks = job.communicator.size(axis)
    for kind in kinds:
        for size in sizes:
            whole, other = _tensors(job, axis, size, dtype)
            own = _time(job, axis, _ours(job, axis, Kind(kind), whole, other), seconds)
            theirs = None
            call = _backends(job, axis, Kind(kind), whole, other)
            if call is not None:
                theirs = _time(job, axis, call, seconds)
            yield Row(kind, whole.nbytes, own, theirs, ranks)


def time_of(
    job: Job, axis: Axis, kind: Kind, nbytes: int, dtype: torch.dtype, seconds: float
) -> float:
    """Median of what the slowest rank takes for one collective. Collective over ``axis``."""
    whole, other = _tensors(job, axis, nbytes, dtype)
    return _time(job, axis, _ours(job, axis, kind, whole, other), seconds)


def _tensors(
    job: Job, axis: Axis, nbytes: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """The tensor that a collective is about, in the job's memory for that, and another like it."""
    ranks = job.communicator.size(axis)
    slice_ = max(1, -(-nbytes // (dtype.itemsize * ranks)))
    whole = job.communicator.buffer(slice_ * ranks, dtype, axis)
    return whole, torch.zeros_like(whole)


def _ours(
    job: Job, axis: Axis, kind: Kind, whole: torch.Tensor, other: torch.Tensor
) -> Callable[[], object]:
    comm, ranks, rank = job.communicator, job.communicator.size(axis), job.communicator.rank(axis)
    part = other[: len(other) // ranks]
    after, before = (rank + 1) % ranks, (rank - 1) % ranks
    return {
        Kind.ALL_REDUCE: lambda: comm.all_reduce(whole, axis, _TAG),
        Kind.REDUCE_SCATTER: lambda: comm.reduce_scatter(part, whole, axis, _TAG),
        Kind.ALL_GATHER: lambda: comm.all_gather(whole, part, axis, _TAG),
        Kind.ALL_TO_ALL: lambda: comm.all_to_all(other, whole, axis, _TAG),
        Kind.BROADCAST: lambda: comm.broadcast(whole, axis, _TAG),
        Kind.SEND_RECEIVE: lambda: comm.send_receive(
            [(whole, after)], [(other, before)], axis, _TAG
        ),
    }[kind]


def _backends(
    job: Job, axis: Axis, kind: Kind, whole: torch.Tensor, other: torch.Tensor
) -> Callable[[], object] | None:
    """The call of ``torch.distributed`` itself; ``None`` where the backend has none."""
    group = job.mesh.group(axis)
    if group is None:
        return None
    ranks, rank = job.communicator.size(axis), job.communicator.rank(axis)
    part = other[: len(other) // ranks]
    if kind is Kind.REDUCE_SCATTER and dist.get_backend(group) == "gloo":
        parts = list(whole.chunk(ranks))
        return lambda: dist.reduce_scatter(part, parts, group=group)
    if kind is Kind.SEND_RECEIVE:
        send, receive = dist.isend, dist.irecv

        def ring() -> None:
            works = [
                send(whole, group=group, group_dst=(rank + 1) % ranks),
                receive(other, group=group, group_src=(rank - 1) % ranks),
            ]
            for work in works:
                assert work is not None
                work.wait()

        return ring
    return {
        Kind.ALL_REDUCE: lambda: dist.all_reduce(whole, group=group),
        Kind.REDUCE_SCATTER: lambda: _reduce_scatter(part, whole, group=group),
        Kind.ALL_GATHER: lambda: _all_gather(whole, part, group=group),
        Kind.ALL_TO_ALL: lambda: dist.all_to_all_single(other, whole, group=group),
        Kind.BROADCAST: lambda: dist.broadcast(whole, group=group, group_src=0),
    }[kind]


def _time(job: Job, axis: Axis, call: Callable[[], object], seconds: float) -> float:
    """Median of what the slowest rank took for a call."""

    def once() -> float:
        begin = time.perf_counter()
        call()
        job.accelerator.synchronize()
        return time.perf_counter() - begin

    for _ in range(_WARM_UP):
        once()
    # Ranks have to make the same number of calls.
    estimate = _slowest(job, axis, [once()])[0]
    count = max(_LEAST, min(_MOST, int(seconds / max(estimate, 1e-6))))
    return statistics.median(_slowest(job, axis, [once() for _ in range(count)]))


def _slowest(job: Job, axis: Axis, times: list[float]) -> list[float]:
    table = torch.tensor(times, dtype=torch.float64, device=job.device)
    tag = Tag(Purpose.CONTROL, site="bench")
    job.communicator.all_reduce(table, axis, tag, op=Op.MAX)
    found: list[float] = table.tolist()
    return found
