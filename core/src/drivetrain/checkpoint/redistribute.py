"""Moving fragments from one layout to another between ranks, in memory.

Each rank first looks for what it wants among what it has itself. Where any rank lacks something,
all tell each other which boxes they have, and each rank plans by itself from whom to take what it
lacks. Then wanted fragments are filled, a group of bounded size at a time; see
:mod:`drivetrain.checkpoint.exchange` for what travels.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING

import torch

from drivetrain.checkpoint.exchange import DTYPES, Exchange, Part, Peers, view_of
from drivetrain.checkpoint.format.boxes import Boxes, Region, common, without
from drivetrain.contracts.state.fragment import Box, Fragment

if TYPE_CHECKING:
    from drivetrain.contracts.world.axis import Axis
    from drivetrain.job.job import Job

LIMIT = 64 << 20
"""Bytes that a rank stages at a time, if the caller does not say."""

_HEAD = 4
"""Integers that come before a fragment's shape and boxes where boxes are exchanged."""


@torch.no_grad()
def redistribute(
    job: Job,
    source: Iterable[Fragment],
    target: Iterable[Fragment],
    *,
    axis: Axis = "world",
    limit: int = LIMIT,
) -> None:
    """Fill fragments of one layout from those of another. Collective.

    Fragments belong together if name and kind are equal. What a rank has itself never travels;
    where several others have the same box, it comes from the nearest. Values are converted to the
    dtype of the target. Targets that are ``"reset"`` on a new layout, and optimizer states that no
    rank has, are filled with their ``initial`` value.

    Args:
        job: communicator and device of the ranks.
        source: what this rank has; its memory is not that of ``target``.
        target: what this rank wants; overwritten.
        axis: the ranks that have and want.
        limit: bytes that a rank keeps at a time beside the fragments, half of it in messages, half
            in targets that are being filled. A fragment whose ``read`` returns a copy is kept as a
            whole all the same, and two ranks exchange at least 16 bytes at a time.

    Raises:
        TrainingError: on every rank, before anything is overwritten: a parameter or master, or a
            part of any fragment, is on no rank, or is there with another shape or of complex
            numbers where real ones are wanted.
    """
    wanted = [fragment for fragment in target if fragment.boxes]
    move = _Move(Peers(job, axis), [f for f in source if f.on_reshape == "redistribute"], limit)
    fills = [move.fill_of(f) for f in wanted if f.on_reshape == "redistribute"]
    move.look_elsewhere(fills)
    move.carry_out([fill for fill in fills if not fill.is_fresh])
    fresh = [fill.fragment for fill in fills if fill.is_fresh]
    for fragment in [f for f in wanted if f.on_reshape == "reset"] + fresh:
        fragment.write(torch.full_like(fragment.read(), fragment.initial))


def kept_on_host(fragments: Iterable[Fragment]) -> list[Fragment]:
    """Copy fragments to host memory, to have them when what they are of is gone."""
    kept = []
    for fragment in fragments:
        values = fragment.read().to("cpu", copy=True)
        kept.append(replace(fragment, home="host", read=values.detach))
    return kept


_Holder = tuple[int, int, torch.dtype]
"""Position of a rank, which of its boxes, and its dtype."""


@dataclass(eq=False)
class _Fill:
    """How one wanted fragment is filled.

    Args:
        fragment: to be overwritten.
        own: what this rank has of it: which of its boxes, which part, into which box.
        missing: what it does not have.
        parts: what comes from others.
        is_fresh: no rank has anything of it.
    """

    fragment: Fragment
    own: list[tuple[int, Region, Box]] = field(default_factory=list)
    missing: list[tuple[Region, Box]] = field(default_factory=list)
    parts: list[tuple[Part, Box]] = field(default_factory=list)
    is_fresh: bool = False


@dataclass(eq=False)
class _Known:
    """What ranks have of one tensor.

    Args:
        shapes: of the whole, as ranks give it.
        holders: offset and size of each distinct box -> who has it.
        boxes: these boxes, once they are searched.
    """

    shapes: set[tuple[int, ...]] = field(default_factory=set)
    holders: dict[Region, list[_Holder]] = field(default_factory=dict)
    boxes: Boxes | None = None

    def overlaps(self, region: Region) -> Iterator[tuple[list[_Holder], Region]]:
        """Who has boxes that overlap ``region``, and what they have in common with it."""
        if self.boxes is None:
            corners = torch.tensor([*self.holders], dtype=torch.int64)
            corners = corners.reshape(len(self.holders), 2, len(region[0]))
            self.boxes = Boxes(corners[:, 0], corners[:, 1])
        lists = [*self.holders.values()]
        for number, shared in self.boxes.overlaps(region):
            yield lists[number], shared


class _Move:
    """One rank's part of a redistribution.

    Args:
        peers: the ranks that have and want.
        have: fragments of this rank.
        limit: see :func:`redistribute`.
    """

    def __init__(self, peers: Peers, have: Sequence[Fragment], limit: int) -> None:
        self._peers, self._limit = peers, limit
        self._listed = _described(have)
        self._own: dict[int, _Known] = {}
        _note(self._own, peers.rank, self._listed)
        self._exchange = Exchange(peers, have, limit // 2)
        self._travels = False
        self._problem: str | None = None

    # -- planning: nothing is changed --------------------------------------------------------------

    def fill_of(self, fragment: Fragment) -> _Fill:
        """What this rank has itself of a wanted fragment, and what it lacks."""
        fill, known = _Fill(fragment), self._own.get(_key(fragment))
        if known is not None and self._misfits(fragment, known):
            known = None
        for box in fragment.boxes:
            rest = [_region(box)]
            for holders, shared in known.overlaps(rest[0]) if known is not None else ():
                fill.own += [(holders[0][1], part, box) for part in _taken(rest, shared)]
            fill.missing += [(region, box) for region in rest]
        return fill

    def _misfits(self, fragment: Fragment, known: _Known) -> bool:
        dtypes = {dtype for holders in known.holders.values() for _, _, dtype in holders}
        what = f"{fragment.name} ({fragment.kind})"
        if others := known.shapes - {fragment.global_shape}:
            was, wanted = list(min(others)), list(fragment.global_shape)
            self._problem = f"{what} has shape {was} in the old layout, and {wanted} in the new one"
        elif not fragment.dtype.is_complex and any(dtype.is_complex for dtype in dtypes):
            self._problem = f"{what} is complex in the old layout, but {fragment.dtype} in the new"
        else:
            return False
        return True

    def look_elsewhere(self, fills: Sequence[_Fill]) -> None:
        """Find out from whom to take what this rank lacks. Collective."""
        lacking = [fill for fill in fills if fill.missing]
        self._travels = bool(self._peers.most(int(bool(lacking) or self._problem is not None)))
        if not self._travels:
            return
        known: dict[int, _Known] = {}
        for rank, listed in enumerate(self._peers.lists(self._listed)):
            _note(known, rank, listed)
        for fill in lacking:
            self._find(fill, known.get(_key(fill.fragment)))
        self._peers.raise_any(self._problem)

    def _find(self, fill: _Fill, known: _Known | None) -> None:
        fragment = fill.fragment
        if known is None:
            if fragment.kind in ("parameter", "master"):
                self._problem = f"no rank has {fragment.name} ({fragment.kind})"
            fill.is_fresh = True
            return
        if self._misfits(fragment, known):
            return
        for region, box in fill.missing:
            rest = [region]
            for holders, shared in known.overlaps(region):
                rank, row, dtype = min(holders, key=lambda h: (abs(h[0] - self._peers.rank), h[:2]))
                wire = min(dtype, fragment.dtype, key=lambda dtype: dtype.itemsize)
                taken = _taken(rest, shared)
                fill.parts += [(Part(rank, row, wire, part), box) for part in taken]
            for low, high in rest:
                self._problem = (
                    f"no rank has elements {list(low)} to {list(high)} of {fragment.name} "
                    f"({fragment.kind})"
                )

    # -- moving ------------------------------------------------------------------------------------

    def carry_out(self, fills: Sequence[_Fill]) -> None:
        """Overwrite the wanted fragments. Collective where anything travels."""
        windows = list(_windows(fills, self._limit // 2))
        count = self._peers.most(len(windows)) if self._travels else len(windows)
        for number in range(count):
            window = windows[number] if number < len(windows) else []
            flats = [fill.fragment.read() for fill in window]
            for fill, flat in zip(window, flats, strict=True):
                for row, region, box in fill.own:
                    view_of(flat, box, region).copy_(self._exchange.values(row, region))
            if self._travels:
                self._exchange.bring(
                    (part, flat, box)
                    for fill, flat in zip(window, flats, strict=True)
                    for part, box in fill.parts
                )
            for fill, flat in zip(window, flats, strict=True):
                fill.fragment.write(flat)


def _windows(fills: Iterable[_Fill], limit: int) -> Iterator[list[_Fill]]:
    """Fragments that are filled together: some small ones, or one that is larger than ``limit``."""
    window: list[_Fill] = []
    size = 0
    for fill in fills:
        fragment = fill.fragment
        nbytes = sum(box.numel for box in fragment.boxes) * fragment.dtype.itemsize
        if window and size + nbytes > limit:
            yield window
            window, size = [], 0
        window.append(fill)
        size += nbytes
    if window:
        yield window


def _note(known: dict[int, _Known], rank: int, listed: Sequence[int]) -> None:
    """Add the fragments that ``rank`` has listed; see :func:`_described`."""
    at = row = 0
    while at < len(listed):
        key, code, dims, count = listed[at : at + _HEAD]
        at += _HEAD + dims
        found = known.setdefault(key, _Known())
        found.shapes.add(tuple(listed[at - dims : at]))
        for _ in range(count):
            box = tuple(listed[at : at + dims]), tuple(listed[at + dims : at + 2 * dims])
            found.holders.setdefault(box, []).append((rank, row, DTYPES[code]))
            at, row = at + 2 * dims, row + 1


def _described(fragments: Iterable[Fragment]) -> list[int]:
    """Fragments as integers: head, shape, then offset and size of each box."""
    found: list[int] = []
    for fragment in fragments:
        dtype, shape = DTYPES.index(fragment.dtype), fragment.global_shape
        found += (_key(fragment), dtype, len(shape), len(fragment.boxes), *shape)
        for box in fragment.boxes:
            found += (*box.global_offset, *box.size)
    return found


def _key(fragment: Fragment) -> int:
    """What kind and name are called between ranks: 63 bits of a digest."""
    digest = hashlib.sha256(f"{fragment.kind}/{fragment.name}".encode()).digest()
    return int.from_bytes(digest[:8], "little") >> 1


def _region(box: Box) -> Region:
    ends = zip(box.global_offset, box.size, strict=True)
    return box.global_offset, tuple(at + extent for at, extent in ends)


def _taken(rest: list[Region], shared: Region) -> list[Region]:
    """Take what lies in ``shared`` out of the disjoint regions ``rest``."""
    found = []
    for region in list(rest):
        if (both := common(region, shared)) is not None:
            rest.remove(region)
            rest += without(region, both)
            found.append(both)
    return found
