"""Where the states of a bucket lie in its file: tile after tile, in each tile kind after kind.

A tile is what is updated at once. All of it, masters and every state, is one piece of the file, so
that it is read and written by one sequential request.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch

from drivetrain.contracts import BucketSpec, Segment
from drivetrain_offload.file_io.memory import aligned
from drivetrain_offload.homes.split import part_of

GRANULE = 4096
"""Tiles of rules that work element by element begin at multiples of so many elements: a kernel then
cuts a tile into vectors as it would cut the whole bucket, and computes the same bits."""


@dataclass(frozen=True)
class Tile:
    """A part of a bucket.

    Args:
        key: names it to the update rule.
        start: its first element.
        numel: number of elements.
        segments: what lies where, counted from ``start``.
        offset: its first byte in the file.
    """

    key: str
    start: int
    numel: int
    segments: tuple[Segment, ...]
    offset: int

    def of(self, flat: torch.Tensor) -> torch.Tensor:
        """This tile of a flat tensor over the bucket, a view."""
        return flat.narrow(0, self.start, self.numel)


@dataclass(frozen=True)
class TileLayout:
    """The file of one bucket.

    Args:
        kinds: what is kept of every element, with its dtype, in the order in which it lies there.
        tiles: they follow each other, in the bucket and in the file.
    """

    kinds: Mapping[str, torch.dtype]
    tiles: tuple[Tile, ...]

    @classmethod
    def of(
        cls, spec: BucketSpec, kinds: Mapping[str, torch.dtype], largest: int | None
    ) -> TileLayout:
        """Cut a bucket.

        Args:
            spec: the bucket, which has a rule.
            kinds: see :class:`TileLayout`.
            largest: elements of a tile, unless one tensor has more and its rule needs it whole;
                ``None`` keeps the bucket whole.
        """
        borders = _borders(spec, spec.numel if largest is None else largest)
        tiles, offset = [], 0
        for start, stop in pairwise(borders):
            part = part_of(spec, start, stop)
            tiles.append(Tile(part.key, start, stop - start, part.segments, offset))
            offset += _nbytes(kinds, stop - start)
        return cls(kinds, tuple(tiles))

    def nbytes(self, tile: Tile) -> int:
        """Length of a tile in the file."""
        return _nbytes(self.kinds, tile.numel)

    @property
    def largest(self) -> int:
        """Length of the largest tile in the file, in bytes."""
        return max((self.nbytes(tile) for tile in self.tiles), default=0)

    @property
    def file_bytes(self) -> int:
        """Length of the file."""
        return sum(self.nbytes(tile) for tile in self.tiles)

    def views(self, tile: Tile, memory: torch.Tensor) -> dict[str, torch.Tensor]:
        """Kind -> flat tensor [tile.numel] in ``memory``, bytes that hold the tile."""
        found, at = {}, 0
        for kind, dtype in self.kinds.items():
            nbytes = tile.numel * dtype.itemsize
            found[kind] = memory[at : at + nbytes].view(dtype)
            at += aligned(nbytes)
        return found

    def places(self, kind: str, start: int, stop: int) -> Iterator[tuple[int, int]]:
        """Elements [start, stop) of a kind: (first byte in the file, number of elements)."""
        skipped = 0
        for tile in self.tiles:
            low, high = max(start, tile.start), min(stop, tile.start + tile.numel)
            if low < high:
                skipped = self._before(kind, tile)
                first = (low - tile.start) * self.kinds[kind].itemsize
                yield tile.offset + skipped + first, high - low

    def _before(self, kind: str, tile: Tile) -> int:
        """Bytes of the kinds that lie before ``kind`` in a tile."""
        names = list(self.kinds)
        before = {name: self.kinds[name] for name in names[: names.index(kind)]}
        return _nbytes(before, tile.numel)


def buffers_for(layouts: Sequence[TileLayout], count: int, size: int) -> tuple[int, int]:
    """Number and bytes of the buffers that tiles pass through.

    Args:
        layouts: of all files.
        count: how many there are to be, if tiles are as long as ``size`` and there are so many.
        size: elements of a tile, as configured. Where some are longer there are fewer buffers, so
            that they take no more memory; two at least.
    """
    largest = max((layout.largest for layout in layouts), default=0)
    usual = max((_nbytes(layout.kinds, max(size, GRANULE)) for layout in layouts), default=0)
    affordable = count * usual // largest if largest else count
    tiles = sum(len(layout.tiles) for layout in layouts)
    return max(2, min(count, affordable, tiles)), largest


def _nbytes(kinds: Mapping[str, torch.dtype], numel: int) -> int:
    return sum(aligned(numel * dtype.itemsize) for dtype in kinds.values())


def _borders(spec: BucketSpec, largest: int) -> list[int]:
    """First elements of the tiles, and the end of the bucket."""
    assert spec.rule is not None, f"bucket {spec.key} is not trained"
    if largest >= spec.numel:
        return [0, spec.numel]
    if spec.rule.grain == "element":
        step = max(GRANULE, largest // GRANULE * GRANULE)
        return [*range(0, spec.numel, step), spec.numel]
    borders = [0]
    for segment in spec.segments:
        if segment.offset + segment.numel - borders[-1] > largest and segment.offset > borders[-1]:
            borders.append(segment.offset)
    return [*borders, spec.numel]
