"""Rectangles of fragments on their way between ranks, in messages of bounded size.

Ranks ask each other for rectangles. Both sides cut these and fill the messages by the same rule, so
that a message holds nothing but numbers. Every collective here is issued by all ranks.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from math import prod
from typing import TYPE_CHECKING

import torch

from drivetrain.checkpoint.format import tensor_file
from drivetrain.checkpoint.format.boxes import Region, cut, extents
from drivetrain.contracts.world.collective import Op, Purpose, Tag
from drivetrain.errors import TrainingError

if TYPE_CHECKING:
    from drivetrain.contracts.state.fragment import Box, Fragment
    from drivetrain.contracts.world.axis import Axis
    from drivetrain.job.job import Job

DTYPES = (*tensor_file.DTYPES.values(), torch.complex128)
"""What fragments may be of; ranks call each by its place here."""

_ALIGNED = 16
"""Rectangles in a message begin at multiples of so many bytes, the size of the largest element."""

_TEXT = 1024
"""Bytes of an error that all ranks get; more is cut off."""


class Peers:
    """The ranks along an axis, and small agreements between them.

    Args:
        job: communicator and device.
        axis: of its mesh.
    """

    def __init__(self, job: Job, axis: Axis) -> None:
        self._job, self._axis = job, axis
        self.size, self.rank = job.communicator.size(axis), job.communicator.rank(axis)
        self.device = job.device

    def integers(self, values: Iterable[int]) -> torch.Tensor:
        """Return ``values`` as a tensor that can travel."""
        return torch.tensor([*values], dtype=torch.int64, device=self.device)

    def most(self, value: int) -> int:
        """Return the largest value of all ranks. Collective."""
        most = self.integers([value])
        tag = Tag(Purpose.STATE, site="redistribute")
        self._job.communicator.all_reduce(most, self._axis, tag, op=Op.MAX)
        return int(most)

    def lists(self, own: Sequence[int]) -> list[list[int]]:
        """Return every rank's list of integers. Collective."""
        communicator, tag = self._job.communicator, Tag(Purpose.STATE, site="redistribute, boxes")
        lengths = self.integers([0] * self.size)
        communicator.all_gather(lengths, self.integers([len(own)]), self._axis, tag)
        longest = int(lengths.max())
        everyone = lengths.new_empty(self.size * longest)
        mine = self.integers([*own, *[0] * (longest - len(own))])
        communicator.all_gather(everyone, mine, self._axis, tag)
        rows = everyone.view(self.size, longest)
        return [row[:n].tolist() for row, n in zip(rows, lengths.tolist(), strict=True)]

    def all_to_all(
        self, input: torch.Tensor, sends: Sequence[int], receives: Sequence[int]
    ) -> torch.Tensor:
        """Send so many elements of flat ``input`` to each rank; return what comes. Collective."""
        output = input.new_empty(sum(receives))
        self._job.communicator.all_to_all(
            output,
            input,
            self._axis,
            Tag(Purpose.STATE, site="redistribute, rectangles"),
            output_splits=receives,
            input_splits=sends,
        )
        return output

    def raise_any(self, problem: str | None) -> None:
        """Raise a problem that any rank has on every rank. Collective.

        Raises:
            TrainingError: names the rank.
        """
        culprit = self.most(-1 if problem is None else self.rank)
        if culprit < 0:
            return
        text = (problem or "").encode()[:_TEXT]
        letters = self.integers([*text, *[0] * (_TEXT - len(text))])
        tag = Tag(Purpose.STATE, site="redistribute, what is wrong")
        self._job.communicator.broadcast(letters, self._axis, tag, source=culprit)
        found = bytes(letters.tolist()).rstrip(b"\0").decode(errors="ignore")
        rank = self._job.mesh.ranks(self._axis)[culprit]
        raise TrainingError(f"states cannot be moved to rank {rank}: {found}")


@dataclass(frozen=True)
class Part:
    """A rectangle that one rank has and another wants.

    Args:
        peer: position of the other rank.
        row: which of the sender's boxes it is a part of.
        wire: dtype in which it travels: the narrower one of both sides.
        region: its corners in the whole tensor.
    """

    peer: int
    row: int
    wire: torch.dtype
    region: Region


class Exchange:
    """Brings rectangles of the fragments of some ranks to others.

    Args:
        peers: the ranks.
        have: fragments of this rank; their boxes are its rows, in order.
        limit: bytes of the messages, out and in, that a rank keeps at a time.
    """

    def __init__(self, peers: Peers, have: Iterable[Fragment], limit: int) -> None:
        self._peers, self._limit = peers, limit
        self._rows = [(fragment, box) for fragment in have for box in fragment.boxes]
        self._open: tuple[Fragment, torch.Tensor] | None = None

    def values(self, row: int, region: Region) -> torch.Tensor:
        """Return a part of one of this rank's boxes."""
        fragment, box = self._rows[row]
        if self._open is None or self._open[0] is not fragment:
            self._open = (fragment, fragment.read())  # once for parts that follow one another
        return view_of(self._open[1], box, region)

    def bring(self, wanted: Iterable[tuple[Part, torch.Tensor, Box]]) -> None:
        """Copy parts of other ranks' boxes to where they are wanted. Collective.

        Args:
            wanted: each part with the flat storage and the box there that it is copied into.
        """
        coming: list[list[tuple[Part, torch.Tensor, Box]]] = [[] for _ in range(self._peers.size)]
        for item in wanted:
            coming[item[0].peer].append(item)
        asked = [[part for part, *_ in items] for items in coming]
        leaving = self._ask(asked)
        busy = max(sum(map(bool, asked)), sum(map(bool, leaving)))
        degree = self._peers.most(busy)
        if not degree:
            return
        quota = max(self._limit // 2 // degree // _ALIGNED, 1) * _ALIGNED
        receives = [list(_rounds(parts, quota)) for parts in asked]
        sends = [list(_rounds(parts, quota)) for parts in leaving]
        for number in range(self._peers.most(max(map(len, receives + sends)))):
            message, counts = self._message([_nth(rounds, number) for rounds in sends])
            due = [_nth(rounds, number) for rounds in receives]
            sizes = [sum(_nbytes(part) for _, part in parts) for parts in due]
            arrived = self._peers.all_to_all(message, counts, sizes)
            at = 0
            for items, parts in zip(coming, due, strict=True):
                for index, part in parts:
                    _, flat, box = items[index]
                    values = arrived.narrow(0, at, _numel(part) * part.wire.itemsize)
                    values = values.view(part.wire).view(extents(part.region))
                    view_of(flat, box, part.region).copy_(values)
                    at += _nbytes(part)
        self._open = None

    def _ask(self, asked: Sequence[Sequence[Part]]) -> list[list[Part]]:
        """Tell each rank what is wanted of it; return what each wants of this one. Collective."""
        questions = [
            [n for p in parts for n in (p.row, DTYPES.index(p.wire), *p.region[0], *p.region[1])]
            for parts in asked
        ]
        peers, one = self._peers, [1] * self._peers.size
        counts = [len(numbers) for numbers in questions]
        sizes = peers.all_to_all(peers.integers(counts), one, one).tolist()
        flat = peers.integers(n for numbers in questions for n in numbers)
        found = iter(peers.all_to_all(flat, counts, sizes).tolist())
        return [list(self._parts(peer, [*islice(found, n)])) for peer, n in enumerate(sizes)]

    def _parts(self, peer: int, numbers: Sequence[int]) -> Iterator[Part]:
        left = iter(numbers)
        for row in left:
            wire, dims = DTYPES[next(left)], len(self._rows[row][0].global_shape)
            low, high = (tuple(next(left) for _ in range(dims)) for _ in range(2))
            yield Part(peer, row, wire, (low, high))

    def _message(self, rounds: Sequence[_Round]) -> tuple[torch.Tensor, list[int]]:
        """The bytes that go to each rank in one round, and how many go to each."""
        counts = [sum(_nbytes(part) for _, part in parts) for parts in rounds]
        message = torch.empty(sum(counts), dtype=torch.uint8, device=self._peers.device)
        at = 0
        for parts in rounds:
            for _, part in parts:
                values = self.values(part.row, part.region).to(part.wire).contiguous().view(-1)
                message.narrow(0, at, values.nbytes).copy_(values.view(torch.uint8))
                at += _nbytes(part)
        return message, counts


_Round = Sequence[tuple[int, Part]]
"""Parts that travel together, each with the number of the part that it was cut from."""


def _rounds(parts: Sequence[Part], quota: int) -> Iterator[_Round]:
    """Cut parts, and put them together to at most ``quota`` bytes."""
    together: list[tuple[int, Part]] = []
    used = 0
    for index, whole in enumerate(parts):
        for region in cut(whole.region, quota // whole.wire.itemsize):
            part = replace(whole, region=region)
            if used + _nbytes(part) > quota:
                yield together
                together, used = [], 0
            together.append((index, part))
            used += _nbytes(part)
    if together:
        yield together


def _nth(rounds: Sequence[_Round], number: int) -> _Round:
    return rounds[number] if number < len(rounds) else ()


def view_of(flat: torch.Tensor, box: Box, region: Region) -> torch.Tensor:
    """A part of ``box`` in the storage that it lies in."""
    starts = zip(*region, box.global_offset, strict=True)
    return box.of_storage(flat)[tuple(slice(low - at, high - at) for low, high, at in starts)]


def _numel(part: Part) -> int:
    return prod(extents(part.region))


def _nbytes(part: Part) -> int:
    """Bytes of a part in a message."""
    return -(-_numel(part) * part.wire.itemsize // _ALIGNED) * _ALIGNED
