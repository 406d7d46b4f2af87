"""What one rank has issued among some ranks, so that ranks can compare it.

Each collective has a fingerprint: kind, tag (purpose, key, site), axis, reduction, source, shape
and dtype. A digest of all fingerprints so far tells in eight bytes whether two ranks have issued
the same ones in the same order; a ring of the latest ones tells which was the first to differ.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from hashlib import blake2b
from typing import TYPE_CHECKING, NamedTuple

from drivetrain.contracts import Collective, Kind, Op
from drivetrain.contracts.world.collective import axis_name

if TYPE_CHECKING:
    import torch

RECENT = 4096
"""Collectives of one group that a rank remembers: those of more than the seconds between looks."""

_PRIME = 0x100000001B3
_MASK = (1 << 64) - 1


class Words:
    """Texts by number, each with a code that is the same on all ranks."""

    def __init__(self) -> None:
        self.texts: list[str] = []
        self.codes: list[int] = []
        self._numbers: dict[Hashable, int] = {}

    def number(self, key: Hashable, text: Callable[[], str]) -> int:
        """The number of what ``key`` stands for; ``text`` is asked when it is new."""
        number = self._numbers.get(key)
        if number is None:
            said = text()
            number = len(self.texts)
            self.codes.append(int.from_bytes(blake2b(said.encode(), digest_size=8).digest()))
            self.texts.append(said)
            self._numbers[key] = number
        return number


class Entry(NamedTuple):
    """One collective.

    Args:
        place: its place among those of its group, from 1.
        digest: of it and all before.
        number: of its text.
        where: the module that was running.
    """

    place: int
    digest: int
    number: int
    where: str


class History:
    """The collectives of one group, or the messages from one rank to another.

    Args:
        words: the texts of entries.

    Attributes:
        last: the latest entry, replaced at once, so that another thread may read it.
    """

    def __init__(self, words: Words) -> None:
        self._words = words
        self.last = Entry(0, 0, -1, "")
        self._ring: list[Entry | None] = [None] * RECENT

    def add(self, number: int, where: str) -> int:
        """Note one more; returns how many there are."""
        count, digest, _, _ = self.last
        count += 1
        digest = ((digest ^ self._words.codes[number]) * _PRIME) & _MASK
        self.last = self._ring[count % RECENT] = Entry(count, digest, number, where)
        return count

    def at(self, count: int) -> Entry | None:
        """Entry ``count``; ``None`` if it is not there yet or no longer."""
        entry = self._ring[count % RECENT]
        return entry if entry is not None and entry.place == count else None

    def recent(self) -> list[Entry]:
        """What is remembered, in order."""
        newest = self.last.place
        counts = range(max(1, newest - RECENT + 1), newest + 1)
        return [entry for entry in map(self.at, counts) if entry is not None]


def fingerprint(collective: Collective) -> Hashable:
    """What all ranks of the axis must have alike."""
    c = collective
    if not c.tensors:
        return c.kind, c.tag, c.axis
    return c.kind, c.tag, c.axis, c.op, c.peer, c.input.dtype, _shape(c)


def text_of(collective: Collective) -> str:
    """The fingerprint in words, the same on all ranks that issue the same."""
    c = collective
    said = f"{c.kind} of {c.tag} over {axis_name(c.axis)!r}"
    if not c.tensors:
        return said
    if c.op is not Op.SUM:
        said += f" ({c.op.value})"
    if c.kind is Kind.BROADCAST:
        said += f" from position {c.peer}"
    return f"{said}, {tensor_text(c.input.dtype, _shape(c))}"


def tensor_text(dtype: torch.dtype, shape: Sequence[int]) -> str:
    """Dtype and shape in words."""
    return f"{str(dtype).removeprefix('torch.')} {list(shape)}"


def _shape(c: Collective) -> tuple[int, ...]:
    """The part of a shape that ranks have alike; -1 stands for rows that each has its own of."""
    match c.kind:
        case Kind.ALL_REDUCE | Kind.BROADCAST:
            return c.input.shape
        case Kind.ALL_TO_ALL:
            if c.input_splits is None and c.output_splits is None:
                return c.input.shape
            return (-1, *c.input.shape[1:])
    return (c.input.numel(),)


def name_of(ranks: Sequence[int]) -> str:
    """A short name of a group: ``0..6/2`` for ranks 0, 2, 4, 6, else all of them."""
    step = ranks[1] - ranks[0] if len(ranks) > 1 else 1
    if step > 0 and list(ranks) == list(range(ranks[0], ranks[-1] + 1, step)):
        return f"{ranks[0]}..{ranks[-1]}/{step}"
    return ",".join(map(str, ranks))


def members(name: str) -> Sequence[int]:
    """The ranks of a group of that name, or both ends of messages ``<from>><to>``."""
    if ">" in name:
        return [int(rank) for rank in name.split(">")]
    if ".." in name:
        first, _, rest = name.partition("..")
        last, _, step = rest.partition("/")
        return range(int(first), int(last) + 1, int(step))
    return [int(rank) for rank in name.split(",")]
