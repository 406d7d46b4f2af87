"""Where every number of a job lives: the one description under checkpoints, resharding, reports."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class Box:
    """A rectangle of a global tensor and where it lies in the local flat storage.

    Args:
        global_offset: index of its first element in the global tensor, per dimension.
        size: extent per dimension.
        local_offset: index of its first element in the fragment's flat storage; the box is
            contiguous there, in row-major order.
    """

    global_offset: tuple[int, ...]
    size: tuple[int, ...]
    local_offset: int

    @property
    def numel(self) -> int:
        """Number of elements."""
        product = 1
        for extent in self.size:
            product *= extent
        return product

    def of(self, whole: torch.Tensor) -> torch.Tensor:
        """This rectangle of the global tensor, a view."""
        ends = zip(self.global_offset, self.size, strict=True)
        return whole[tuple(slice(start, start + extent) for start, extent in ends)]

    def of_storage(self, flat: torch.Tensor) -> torch.Tensor:
        """This rectangle where it lies in a fragment's flat storage, a view."""
        return flat.narrow(0, self.local_offset, self.numel).view(self.size)


@dataclass(frozen=True)
class Fragment:
    """This rank's part of one state tensor.

    Args:
        name: the client's stable parameter name.
        kind: ``"parameter"``, ``"master"``, ``"gradient"`` or an optimizer state's name.
        global_shape: shape of the whole tensor.
        dtype: dtype of the stored numbers.
        boxes: which rectangles of the whole this rank holds; empty when it holds nothing.
        owner: whether this rank is the one that counts the fragment in norms and writes it.
        home: where the storage is, for reports: ``"device"``, ``"host"``, ``"nvme"``, ...
        read: returns the flat local storage [sum of box numels]; may copy, may touch a disk.
        write: overwrites the local storage with a flat tensor of the same length.
        on_reshape: what loading into another layout does: ``"redistribute"`` the boxes, or
            ``"reset"`` a state that is no part of a whole, such as error feedback.
        initial: value that a fresh optimizer state is filled with.
    """

    name: str
    kind: str
    global_shape: tuple[int, ...]
    dtype: torch.dtype
    boxes: tuple[Box, ...]
    owner: bool
    home: str
    read: Callable[[], torch.Tensor]
    write: Callable[[torch.Tensor], None]
    on_reshape: Literal["redistribute", "reset"] = "redistribute"
    initial: float = 0.0


def interval_boxes(shape: Sequence[int], start: int, stop: int) -> Iterator[Box]:
    """Cover elements [start, stop) of a row-major tensor of ``shape`` by at most 2n-1 boxes.

    Boxes come in order of their offsets, so ``local_offset`` counts from 0 without gaps. A scalar
    (empty shape) is one box of empty extent.
    """
    yield from _boxes(tuple(shape), start, stop, (), 0)


def placed_boxes(boxes: Sequence[Box], start: int, stop: int) -> Iterator[Box]:
    """Elements [start, stop) of a local tensor that holds ``boxes`` of a global one.

    Local offsets of the answer count from ``start``; elements in no box (padding) are left out.
    """
    for box in boxes:
        low, high = max(start, box.local_offset), min(stop, box.local_offset + box.numel)
        for part in interval_boxes(box.size, low - box.local_offset, high - box.local_offset):
            place = zip(box.global_offset, part.global_offset, strict=True)
            offset = tuple(outer + inner for outer, inner in place)
            yield Box(offset, part.size, low - start + part.local_offset)


def _boxes(
    shape: tuple[int, ...], start: int, stop: int, prefix: tuple[int, ...], local: int
) -> Iterator[Box]:
    if stop <= start:
        return
    if not shape:
        yield Box(prefix, (1,) * len(prefix), local)
        return
    row = 1
    for extent in shape[1:]:
        row *= extent
    first, last = -(-start // row), stop // row  # whole rows [first, last)
    ones = (1,) * len(prefix)
    if first > last:  # both ends inside one row
        yield from _boxes(shape[1:], start - last * row, stop - last * row, (*prefix, last), local)
        return
    head = first * row - start
    if head:
        yield from _boxes(shape[1:], row - head, row, (*prefix, first - 1), local)
    if last > first:
        rest = (0,) * (len(shape) - 1)
        yield Box((*prefix, first, *rest), (*ones, last - first, *shape[1:]), local + head)
    tail = stop - last * row
    if tail:
        yield from _boxes(shape[1:], 0, tail, (*prefix, last), local + head + (last - first) * row)
