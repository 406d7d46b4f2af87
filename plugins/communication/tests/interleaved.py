"""Collectives of several routes at once, in one order on all ranks, waited for in another on each.

Run as a script it does so over MPI as well: ``mpirun -n 4 python interleaved.py``.
"""

from __future__ import annotations

import os
import random
import sys
from collections.abc import Callable
from typing import Any

import torch

from drivetrain.communication.process_group import Ranks
from drivetrain.contracts import Axis, Communicator, Handle, Op, Purpose, SubAxis, Tag
from drivetrain.job.job import Job
from drivetrain.plan.plan import Plan

TAG = Tag(Purpose.GRADIENT, "k")

SIZES = (3, 64, 1000, 20_000)
UNDER_WAY = 8
"""Handles that a rank holds at most."""


def open_job(others: dict[str, Any] | None = None, **routes: Any) -> Job:
    config = {"train_micro_batch_size_per_gpu": 1, "communication": {"routes": routes}}
    plan = Plan.build({**config, **(others or {})}, world_size=Ranks.current().world_size)
    return Job.open(plan)


def values(rank: int, numel: int, turn: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1000 * turn + rank)
    return torch.randint(-50, 50, (numel,), generator=generator).float()


def one(
    comm: Communicator, rank: int, kind: str, axis: Axis, ranks: list[int], numel: int, turn: int
) -> tuple[Handle, Callable[[], bool]]:
    """Start a collective; returns its handle, and whether it brought what it should have."""
    size, place = len(ranks), ranks.index(rank)
    own = values(rank, numel * size, turn)
    every = [values(other, numel * size, turn) for other in ranks]
    if kind == "all_reduce":
        most = turn % 3 == 0
        op, wanted = (
            (Op.MAX, torch.stack(every).amax(0)) if most else (Op.SUM, torch.stack(every).sum(0))
        )
        out = own
        handle = comm.all_reduce(out, axis, TAG, op=op, asynchronous=True)
    elif kind == "reduce_scatter":
        out = own[place * numel : (place + 1) * numel]
        wanted = torch.stack(every).sum(0)[place * numel : (place + 1) * numel]
        handle = comm.reduce_scatter(out, own, axis, TAG, asynchronous=True)
    elif kind == "all_gather":
        out, wanted = torch.empty(numel * size), torch.cat([v[:numel] for v in every])
        handle = comm.all_gather(out, own[:numel].clone(), axis, TAG, asynchronous=True)
    elif kind == "all_to_all":
        out = torch.empty(numel * size)
        wanted = torch.cat([v[place * numel : (place + 1) * numel] for v in every])
        handle = comm.all_to_all(out, own, axis, TAG, asynchronous=True)
    elif kind == "uneven":
        # Place p sends p + i rows to place i.
        rows = [place + i for i in range(size)]
        starts = [sum(p + i for i in range(place)) for p in range(size)]
        parts = [v.repeat(2 * size)[starts[p] : starts[p] + p + place] for p, v in enumerate(every)]
        out, wanted = torch.empty(sum(rows)), torch.cat(parts)
        sent = own.repeat(2 * size)[: sum(rows)].clone()
        splits = {"output_splits": rows, "input_splits": rows}
        handle = comm.all_to_all(out, sent, axis, TAG, asynchronous=True, **splits)
    elif kind == "broadcast":
        source = turn % size
        out, wanted = own, every[source]
        handle = comm.broadcast(out, axis, TAG, source=source, asynchronous=True)
    else:
        out, wanted = torch.empty(numel), every[(place - 1) % size][:numel]
        sends = [(own[:numel].clone(), (place + 1) % size)]
        receives = [(out, (place - 1) % size)]
        handle = comm.send_receive(sends, receives, axis, TAG, asynchronous=True)
    return handle, lambda: torch.equal(out, wanted)


KINDS = (
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "all_to_all",
    "uneven",
    "broadcast",
    "send_receive",
)


def run_all(job: Job, turns: int) -> list[str]:
    """What came wrong, of ``turns`` collectives."""
    shared, own = random.Random(7), random.Random(job.rank)
    half = job.world_size // 2
    axes: list[Axis] = ["world", SubAxis("world", tuple(range(half)))]
    axes.append(SubAxis("world", tuple(range(half, job.world_size))))
    under_way: list[tuple[str, Handle, Callable[[], bool]]] = []
    wrong = []

    def wait(limit: int) -> None:
        while len(under_way) > limit:
            name, handle, is_right = under_way.pop(own.randrange(len(under_way)))
            handle.wait()
            if not is_right():
                wrong.append(name)

    for turn in range(turns):
        kind, axis = shared.choice(KINDS), shared.choice(axes)
        numel = shared.choice(SIZES)
        ranks = list(job.mesh.layout.group(0, "world"))
        if isinstance(axis, SubAxis):
            ranks = list(axis.positions)
        if job.rank in ranks and len(ranks) > 1:
            started = one(job.communicator, job.rank, kind, axis, ranks, numel, turn)
            under_way.append((f"{turn}: {kind} of {numel} over {ranks}", *started))
        wait(own.randrange(UNDER_WAY))
    wait(0)
    return wrong


def main() -> None:
    """One rank that mpirun has started."""
    for variable, name in (
        ("RANK", "RANK"),
        ("WORLD_SIZE", "SIZE"),
        ("LOCAL_RANK", "LOCAL_RANK"),
        ("LOCAL_WORLD_SIZE", "LOCAL_SIZE"),
    ):
        os.environ[variable] = os.environ[f"OMPI_COMM_WORLD_{name}"]
    rules = [
        {"collective": "all_reduce", "at_least_bytes": 100_000, "route": "two_levels"},
        {"collective": "all_reduce", "at_least_bytes": 2000, "route": "mpi"},
        {"collective": "all_gather", "route": "gloo"},
        {"collective": "broadcast", "route": "job"},
        {"route": "mpi"},
    ]
    with open_job(rules=rules, ranks_per_host=2) as job:
        wrong = run_all(job, int(sys.argv[1]))
        half = torch.full((100,), 1.5, dtype=torch.bfloat16)
        job.communicator.all_reduce(half, "world", TAG)  # MPI knows no bf16, so it goes elsewhere
        job.communicator.barrier("world", TAG)
        if not bool((half == 1.5 * job.world_size).all()):
            wrong.append("sum of bf16")
        from drivetrain_communication.routes.plugin import routers

        seen = {route for _, _, route in routers[job].taken}
        sys.stdout.write(f"rank {job.rank}: {wrong} by {sorted(seen)}\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
