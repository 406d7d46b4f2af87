"""Which of several ways each collective takes, and the ways themselves.

[Note: order] Ranks issue the collectives of an axis in one order, and each chooses by what all of
them see alike: kind, dtype, size, axis. So they choose the same route, and the order on each route
is the same for all. Every route moves on by itself while a rank waits for another one (gloo and
shared memory on threads, NCCL on its stream, MPI on a thread of ours), so handles may be waited for
in any order, and no rank is kept from issuing what another one waits for. What is read in place
(settled gathers) never leaves the memory where it lies.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch

from drivetrain.communication.mesh import Mesh
from drivetrain.communication.torch_communicator import TorchCommunicator
from drivetrain.contracts import (
    Axis,
    Collective,
    Communicator,
    CommunicatorWrapper,
    Handle,
    Kind,
    Purpose,
    SubAxis,
    Tag,
)
from drivetrain_communication.routes.hierarchy import Hierarchical, Levels, is_even
from drivetrain_communication.routes.presence import JOB, TWO_LEVELS, backend, innermost
from drivetrain_communication.routes.section import ANY, RoutesSection, Rule
from drivetrain_communication.routes.table import Shape, Table
from drivetrain_communication.routes.through_host import ThroughHost

if TYPE_CHECKING:
    from drivetrain.job.job import Job

_TRIAL = Tag(Purpose.ACTIVATION, site="tune")

logger = logging.getLogger("drivetrain.communication")


class Router(CommunicatorWrapper):
    """Sends each collective the way that rules, a table, or the default say; see [Note: order].

    Args:
        inner: the way of the job without rules.
        job: whose ranks they are.
        section: the rules.
        hosts: the host of each rank of the world.

    Attributes:
        table: what was measured, if the config names a file.
        hosts: see above.
        taken: axis, kind and route of what has been sent.
        forced: while it is set, everything that it can carry goes this way; for measurements.
    """

    def __init__(
        self, inner: Communicator, job: Job, section: RoutesSection, hosts: Sequence[int]
    ) -> None:
        super().__init__(inner)
        self.table: Table | None = None
        self.forced: str | None = None
        self.hosts = hosts
        self._job, self._section = job, section
        # Hops of two levels come back here: each goes the best way inside a host, or between them.
        self._levels = Hierarchical(self, job.mesh.ranks, hosts)
        self._ways: dict[str, Communicator] = {JOB: inner, TWO_LEVELS: self._levels}
        self.taken: set[tuple[Axis, Kind, str]] = set()
        self._shapes: dict[Axis, Shape] = {}

    def run(self, collective: Collective) -> Handle:
        c = collective
        if c.kind is not Kind.BARRIER and c.tensors and c.tensors[0].is_meta:
            return self.inner.run(c)
        if c.settled and self.inner.reads_settled(c.input, c.axis):
            return self.inner.run(c)
        route = self.route_of(c)
        self._say(c, route)
        return self.way(route).run(c)

    def route_of(self, c: Collective) -> str:
        """The route that ``c`` takes; the same on all ranks that issue it."""
        return next((name for name in self._wanted(c) if self._carries(name, c)), JOB)

    def way(self, route: str) -> Communicator:
        """The communicator of a route that exists here, opened when it is first asked for."""
        if route not in self._ways:
            self._ways[route] = self._open(route)
        return self._ways[route]

    def _wanted(self, c: Collective) -> Iterator[str]:
        """Routes for ``c``, best first."""
        nbytes = size_of(c)
        if self.forced is not None:
            # A hop of the two levels that are measured goes the job's way.
            yield JOB if self.forced == TWO_LEVELS and isinstance(c.axis, SubAxis) else self.forced
            return
        for rule in self._section.rules:
            if fits(rule, c, nbytes):
                yield rule.route
        if self.table is not None:
            found = self.table.route(c.kind, self.shape(c.axis), nbytes)
            # Two levels of unequal slices have one hop more, of counts, and were not measured.
            if found is not None and (found != TWO_LEVELS or is_even(c)):
                yield found
                return
        if self._section.hierarchical and nbytes >= self._section.minimum_bytes:
            yield TWO_LEVELS

    def _carries(self, route: str, c: Collective) -> bool:
        if route == TWO_LEVELS:
            return self._levels.carries(c)
        if route == "mpi":
            from drivetrain_communication.routes.mpi import MpiCommunicator

            return MpiCommunicator.carries(c)
        return True

    def shape(self, axis: Axis) -> Shape:
        """Ranks and hosts of an axis."""
        if axis not in self._shapes:
            ranks = self._job.mesh.ranks(axis)
            self._shapes[axis] = Shape(len(ranks), len({self.hosts[rank] for rank in ranks}))
        return self._shapes[axis]

    def levels_of(self, axis: Axis) -> Levels | None:
        """The levels that collectives over ``axis`` can be taken apart into."""
        return self._levels.levels_of(axis)

    def would_take(self, route: str, kind: Kind, axis: Axis, nbytes: int) -> bool:
        """Whether a collective of fp32 tensors can go by ``route``."""
        numel = max(self.size(axis), nbytes // 4)
        numel -= numel % self.size(axis)
        tensor = torch.empty(numel, dtype=torch.float32)
        return self._carries(route, Collective(kind, (tensor,), axis, _TRIAL))

    def _open(self, route: str) -> Communicator:
        job, plain = self._job, innermost(self.inner)
        if route == "shared_memory":
            return self.inner
        if route == backend():
            return plain
        if route == "mpi":
            from drivetrain_communication.routes.mpi import MpiCommunicator

            mpi = MpiCommunicator(plain, job)
            job.on_close(mpi.close)
            return ThroughHost(mpi)
        meet = None if job.failures is None else job.failures.meet
        mesh = Mesh(job.mesh.layout, job.rank, backend=route, meet=meet)
        other = TorchCommunicator(mesh, job.device, job.failures)
        job.on_close(mesh.close)
        job.on_close(other.close)
        return ThroughHost(other)

    def _say(self, c: Collective, route: str) -> None:
        if (c.axis, c.kind, route) not in self.taken:
            self.taken.add((c.axis, c.kind, route))
            if self._job.rank == 0:
                logger.info(
                    "%s over %r goes by %s from %s bytes", c.kind, c.axis, route, size_of(c)
                )


def size_of(c: Collective) -> int:
    """Bytes by which a route is chosen; 0 where ranks see different sizes.

    That is so in exchanges of unequal slices, and in messages, which two ranks may issue in
    different batches.
    """
    if c.kind in (Kind.SEND_RECEIVE, Kind.BARRIER):
        return 0
    if not is_even(c):
        return 0
    return max(tensor.nbytes for tensor in c.tensors)


def fits(rule: Rule, c: Collective, nbytes: int) -> bool:
    """Whether ``rule`` is about ``c``."""
    if rule.collective not in (ANY, str(c.kind)) or rule.axis not in (ANY, c.axis):
        return False
    return rule.at_least_bytes <= nbytes and (rule.below_bytes is None or nbytes < rule.below_bytes)
