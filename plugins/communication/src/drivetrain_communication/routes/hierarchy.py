"""Collectives in two levels: inside hosts, and between them.

[Note: two levels] Positions of an axis are (host, place on the host). A sum over all is made as
sums of slices over each host (reduce-scatter), sums of these over hosts (all-reduce between ranks
of the same place), and a gather on each host. Of n bytes each rank sends at most 2 n / places over
the network, whatever the number of hosts, and all places of a host send at the same time. An
exchange goes to the place of its target first, and then to its host, in messages that are as many
times larger as a host has places. In one of unequal slices the ranks of a host first tell each
other how many rows come to each place for each host; the last hop's rows are known to the rank that
gets them. Bytes between hosts are those of one hop. These are the all-reduce of Horovod's
hierarchical mode and the all-to-all of DeepSpeed-MoE (arXiv:2201.05596, section 5.3).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

from drivetrain.contracts import (
    DONE,
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

if TYPE_CHECKING:
    from drivetrain.job.job import Job

logger = logging.getLogger("drivetrain.communication")


@dataclass(frozen=True)
class Levels:
    """The two levels of an axis, as one rank sees them.

    Args:
        inside: this rank and those of its host, in order of place.
        across: ranks of the same place on all hosts.
        hosts: positions of the axis by host, then by place.
    """

    inside: Axis
    across: Axis
    hosts: tuple[tuple[int, ...], ...]


def find_levels(axis: Axis, hosts: Sequence[int], position: int) -> Levels | None:
    """The levels of ``axis``; ``None`` where one hop is as good.

    That is so on one host, with one rank a host, and where hosts have different numbers of ranks.

    Args:
        axis: the whole axis.
        hosts: the host of each of its positions.
        position: this rank's.
    """
    members: dict[int, list[int]] = {}
    for place, host in enumerate(hosts):
        members.setdefault(host, []).append(place)
    rows = tuple(map(tuple, members.values()))
    if isinstance(axis, SubAxis) or len(rows) == 1 or len({len(row) for row in rows}) > 1:
        return None
    columns = list(zip(*rows, strict=True))
    # Positions of a sub-axis ascend, so those of a column have to.
    if len(rows[0]) == 1 or any(tuple(sorted(column)) != column for column in columns):
        return None
    mine = next(row for row in rows if position in row)
    return Levels(SubAxis(axis, mine), SubAxis(axis, columns[mine.index(position)]), rows)


def hosts_of(job: Job, ranks_per_host: int | None) -> list[int]:
    """The host of every rank, by the number of its first rank. Collective."""
    if ranks_per_host is not None:
        return [rank // ranks_per_host for rank in range(job.world_size)]
    firsts = torch.zeros(job.world_size, dtype=torch.int64, device=job.device)
    firsts[job.rank] = job.rank - job.ranks.local_rank
    job.communicator.all_reduce(firsts, "world", Tag(Purpose.CONTROL, site="hosts"))
    return [int(first) for first in firsts]


class Hierarchical(CommunicatorWrapper):
    """Splits all-reduces and all-to-alls into two levels; see [Note: two levels].

    All hops but the last are waited for at once, so that all ranks begin the next in one order, and
    nothing can hang that did not before.

    Args:
        inner: carries the hops.
        ranks: answers the global ranks along an axis.
        hosts: the host of every rank of the world.
    """

    def __init__(
        self,
        inner: Communicator,
        ranks: Callable[[Axis], Sequence[int]],
        hosts: Sequence[int],
    ) -> None:
        super().__init__(inner)
        self._ranks = ranks
        self._hosts = hosts
        self._levels: dict[Axis, Levels | None] = {}

    def run(self, collective: Collective) -> Handle:
        if not self.carries(collective):
            return self.inner.run(collective)  # which says what is wrong, if anything is
        levels = self.levels_of(collective.axis)
        assert levels is not None
        if collective.kind is Kind.ALL_REDUCE:
            return self._all_reduce(collective, levels)
        return (self._all_to_all if is_even(collective) else self._exchange)(collective, levels)

    def carries(self, c: Collective) -> bool:
        """Whether ``c`` can be taken apart; all ranks come to the same answer."""
        if c.kind not in (Kind.ALL_REDUCE, Kind.ALL_TO_ALL):
            return False
        if c.input.is_meta or self.levels_of(c.axis) is None:
            return False
        size = self.size(c.axis)
        # Of fewer elements than ranks, some levels would get none; slices may be empty.
        enough = not is_even(c) or c.input.numel() >= size
        return enough and c.flaw(size, self.rank(c.axis)) is None

    def levels_of(self, axis: Axis) -> Levels | None:
        """The two levels of ``axis``; ``None`` where one hop is as good."""
        if axis not in self._levels:
            hosts = [self._hosts[rank] for rank in self._ranks(axis)]
            found = find_levels(axis, hosts, self.rank(axis))
            self._levels[axis] = found
            if found is not None and self.rank(axis) == 0:
                shape = f"{len(found.hosts)} hosts of {len(found.hosts[0])} ranks"
                logger.info("collectives over %r go in two levels: %s", axis, shape)
        return self._levels[axis]

    def _all_reduce(self, c: Collective, levels: Levels) -> Handle:
        places, place = self.size(levels.inside), self.rank(levels.inside)
        flat = c.output.view(-1)
        even = len(flat) // places * places
        if even != len(flat):  # at most places - 1 elements more, which take one hop
            self.inner.run(Collective(Kind.ALL_REDUCE, (flat[even:],), c.axis, c.tag, c.op))
        body = flat[:even]
        part = body[place * (even // places) : (place + 1) * (even // places)]
        self.inner.reduce_scatter(part, body, levels.inside, c.tag, op=c.op)
        self.inner.all_reduce(part, levels.across, c.tag, op=c.op)
        return self.inner.all_gather(body, part, levels.inside, c.tag, asynchronous=c.asynchronous)

    def _all_to_all(self, c: Collective, levels: Levels) -> Handle:
        hosts, places = len(levels.hosts), len(levels.hosts[0])
        order = [position for row in levels.hosts for position in row]
        rows = c.input.view(hosts * places, -1)
        # [host, place] of the target -> first all hosts of one place.
        by_place = rows[order].view(hosts, places, -1).transpose(0, 1).contiguous()
        came = torch.empty_like(by_place)
        self.inner.all_to_all(came.view(-1), by_place.view(-1), levels.inside, c.tag)
        # [place of the source, host of the target] -> one message for each host.
        by_host = came.transpose(0, 1).contiguous()
        arrived = torch.empty_like(by_host)
        handle = self.inner.all_to_all(
            *(arrived.view(-1), by_host.view(-1), levels.across, c.tag),
            asynchronous=c.asynchronous,
        )

        def finish() -> None:
            c.output.view(hosts * places, -1)[order] = arrived.view(hosts * places, -1)

        return _then(handle, finish, later=c.asynchronous)

    def _exchange(self, c: Collective, levels: Levels) -> Handle:
        hosts, places = len(levels.hosts), len(levels.hosts[0])
        to = _rows(c.input, c.input_splits, hosts * places)
        of = _rows(c.output, c.output_splits, hosts * places)
        # Slices for all hosts of one place, then those for the next place.
        targets = [levels.hosts[host][place] for place in range(places) for host in range(hosts)]
        slices = torch.split(c.input, to)
        sent = torch.cat([slices[target] for target in targets])
        counts = torch.tensor([to[target] for target in targets], device=c.input.device)
        came = torch.empty_like(counts)
        tag = Tag(Purpose.CONTROL, c.tag.key, c.tag.site)
        self.inner.all_to_all(came, counts, levels.inside, tag)
        table = came.view(places, hosts)  # rows of each place's rank here for each host
        here = c.input.new_empty(int(came.sum()), *c.input.shape[1:])
        self.inner.all_to_all(
            *(here, sent, levels.inside, c.tag),
            output_splits=table.sum(1).tolist(),
            input_splits=counts.view(places, hosts).sum(1).tolist(),
        )
        # [place of the source, host of the target] -> one message for each host.
        pieces = torch.split(here, came.tolist())
        by_host = torch.cat([piece for host in range(hosts) for piece in pieces[host::hosts]])
        order = [position for row in levels.hosts for position in row]
        in_order = order == sorted(order)
        arrived = c.output if in_order else torch.empty_like(c.output)
        handle = self.inner.all_to_all(
            *(arrived, by_host, levels.across, c.tag),
            output_splits=[sum(of[position] for position in row) for row in levels.hosts],
            input_splits=table.sum(0).tolist(),
            asynchronous=c.asynchronous,
        )

        def finish() -> None:
            slices = torch.split(arrived, [of[position] for position in order])
            into = torch.split(c.output, of)
            for position, piece in zip(order, slices, strict=True):
                into[position].copy_(piece)

        return handle if in_order else _then(handle, finish, later=c.asynchronous)


class _Then:
    """A last hop, and what is to be done with what it brings."""

    def __init__(self, handle: Handle, finish: Callable[[], None]) -> None:
        self._handle = handle
        self._finish: Callable[[], None] | None = finish

    def wait(self) -> None:
        self._handle.wait()
        finish, self._finish = self._finish, None  # repeated waits are allowed
        if finish is not None:
            finish()


def _then(handle: Handle, finish: Callable[[], None], *, later: bool) -> Handle:
    if later:
        return _Then(handle, finish)
    finish()
    return DONE


def is_even(c: Collective) -> bool:
    """Whether all ranks see one size: slices of an exchange are equal, or it is no exchange."""
    return c.input_splits is None and c.output_splits is None


def _rows(tensor: torch.Tensor, splits: Sequence[int] | None, size: int) -> list[int]:
    """Rows of ``tensor`` that go to, or come from, each rank."""
    return [len(tensor) // size] * size if splits is None else list(splits)
