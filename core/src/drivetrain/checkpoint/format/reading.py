"""Filling fragments from a checkpoint: only the bytes that this rank needs, checked, in parallel.

Overlaps between the boxes of a fragment and stored ones are cut into pieces of at most
:data:`CHUNK` bytes. Pieces that lie together in a file are read at once, by a few threads; each
checks its blocks and copies its elements into place. What is in memory at a time is one group
of fragments, and a chunk per thread.
"""

from __future__ import annotations

import threading
import zlib
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from math import prod

import torch

from drivetrain.checkpoint.format.boxes import Region, covers_once
from drivetrain.checkpoint.format.index import StoredBox, StoredTensor
from drivetrain.checkpoint.format.storage import Storage
from drivetrain.checkpoint.format.tensor_file import BLOCK, as_buffer
from drivetrain.contracts.state.fragment import Box, Fragment
from drivetrain.errors import CheckpointError

CHUNK = 16 << 20
"""Bytes of a file read at once."""

_WINDOW = 4 * CHUNK
_GAP = 64 << 10
"""Unneeded bytes between two pieces that are cheaper to read than to skip."""

_THREADS = 4


@dataclass(frozen=True)
class Piece:
    """Elements of one stored box that go to one place.

    Args:
        name: the tensor, for messages.
        box: the stored box.
        dtype: of its elements.
        start: offset in the file of the first byte to read, at the beginning of a block.
        stop: offset behind the last.
        region: the elements, in coordinates of the box.
        target: where they go, a view of the same extents.
    """

    name: str
    box: StoredBox
    dtype: torch.dtype
    start: int
    stop: int
    region: Region
    target: torch.Tensor


def check_coverage(fragment: Fragment, source: StoredTensor, place: str) -> None:
    """Make sure that a fragment can be filled, without reading anything.

    Raises:
        CheckpointError: the shapes differ, a part is not stored, or imaginary parts would be lost.
    """
    what = f"{fragment.name} ({fragment.kind})"
    refuse_complex(what, fragment, source.dtype, f"checkpoint {place}")
    if source.shape != fragment.global_shape:
        raise CheckpointError(
            f"{what} has shape {list(fragment.global_shape)} in the model, but "
            f"{list(source.shape)} in checkpoint {place}"
        )
    for box in fragment.boxes:
        found = list(source.overlaps(box.global_offset, box.size))
        held = sum(prod(_minus(high, low)) for _, low, high in found)
        if held != box.numel:
            problem = "holds only a part of" if held < box.numel else "holds twice a part of"
            raise CheckpointError(f"checkpoint {place} {problem} {what}")
        corners = [(low, high) for _, low, high in found]
        end = tuple(at + extent for at, extent in zip(box.global_offset, box.size, strict=True))
        if len(found) > 1 and not covers_once(corners, box.global_offset, end):
            raise CheckpointError(
                f"checkpoint {place} holds twice a part of {what}, and another part not at all"
            )


def refuse_complex(what: str, fragment: Fragment, dtype: torch.dtype, place: str) -> None:
    """Check that values of ``dtype`` can be converted to those of a fragment.

    Raises:
        CheckpointError: they are complex, and the fragment's are real.
    """
    if dtype.is_complex and not fragment.dtype.is_complex:
        raise CheckpointError(
            f"{what} is {fragment.dtype} in the model, but complex ({dtype}) in {place}"
        )


def restore(storage: Storage, work: Iterable[tuple[Fragment, StoredTensor]]) -> None:
    """Overwrite fragments with what is stored, converted to their dtypes.

    Raises:
        CheckpointError: bytes are damaged; names the tensor. Some fragments are overwritten then.
    """
    with ThreadPoolExecutor(_THREADS, "checkpoint-read") as pool, torch.no_grad():
        for window in _windows(work):
            filled = [(fragment, fragment.read()) for fragment, _ in window]
            pieces = [
                piece
                for (fragment, source), (_, flat) in zip(window, filled, strict=True)
                for box in fragment.boxes
                for piece in _pieces(source, box, box.of_storage(flat))
            ]
            for _ in pool.map(lambda span: _fill(storage, span), _spans(pieces)):
                pass
            for fragment, flat in filled:
                fragment.write(flat)


def read_whole(storage: Storage, source: StoredTensor) -> torch.Tensor:
    """A stored tensor in host memory.

    Raises:
        CheckpointError: bytes are damaged or missing.
    """
    boxes = [source.box(number) for number in range(len(source))]
    if not source.is_whole():
        raise CheckpointError(
            f"the files below {storage.root} hold only a part of {source.name}, or a part twice"
        )
    sizes = {path: storage.size(path) or 0 for path in {box.file.path for box in boxes}}
    for box in boxes:  # before memory is taken for them
        nbytes = prod(box.size) * source.dtype.itemsize
        if box.at + nbytes > sizes[box.file.path]:
            raise CheckpointError(
                f"checkpoint file {box.file.place} is damaged: it ends before the "
                f"{nbytes:,} bytes of {source.name} do"
            )
    if (nbytes := prod(source.shape) * source.dtype.itemsize) > (held := sum(sizes.values())):
        raise CheckpointError(
            f"{source.name} is damaged: it has {nbytes:,} bytes, and the files that hold it "
            f"{held:,}"
        )
    whole = torch.empty(source.shape, dtype=source.dtype)
    everything = Box((0,) * whole.dim(), source.shape, 0)
    for span in _spans(_pieces(source, everything, whole)):
        _fill(storage, span)
    return whole


def _windows(
    work: Iterable[tuple[Fragment, StoredTensor]],
) -> Iterator[list[tuple[Fragment, StoredTensor]]]:
    """Fragments that are in memory together: some small ones, or one that is larger."""
    window: list[tuple[Fragment, StoredTensor]] = []
    size = 0
    for fragment, source in work:
        nbytes = sum(box.numel for box in fragment.boxes) * fragment.dtype.itemsize
        if window and size + nbytes > _WINDOW:
            yield window
            window, size = [], 0
        window.append((fragment, source))
        size += nbytes
    if window:
        yield window


def _pieces(source: StoredTensor, box: Box, target: torch.Tensor) -> Iterator[Piece]:
    """All that ``box`` needs of a stored tensor; ``target`` has its extents."""
    for stored, low, high in source.overlaps(box.global_offset, box.size):
        begin = _minus(low, stored.offset)
        whole = (begin, _minus(high, stored.offset))
        into = _minus(box.global_offset, stored.offset)
        for start, stop, region in _cut(stored, whole, source.dtype.itemsize):
            place = zip(_minus(region[0], into), _minus(region[1], into), strict=True)
            view = target[tuple(slice(first, last) for first, last in place)]
            yield Piece(source.name, stored, source.dtype, start, stop, region, view)


def _cut(box: StoredBox, region: Region, itemsize: int) -> Iterator[tuple[int, int, Region]]:
    """Halve a region until the bytes from its first to its last element are a chunk.

    Yields:
        The bytes of the file to be read for a part, extended to whole blocks, and the part.
    """
    strides = _strides(box.size)
    first = _dot(region[0], strides) * itemsize
    last = (_dot([end - 1 for end in region[1]], strides) + 1) * itemsize
    extents = _minus(region[1], region[0])
    if last - first > CHUNK and max(extents) > 1:
        axis = next(i for i, extent in enumerate(extents) if extent > 1)
        middle = region[0][axis] + extents[axis] // 2
        yield from _cut(box, (region[0], _with(region[1], axis, middle)), itemsize)
        yield from _cut(box, (_with(region[0], axis, middle), region[1]), itemsize)
        return
    if box.checksums:
        first -= first % BLOCK
        last = min(-(-last // BLOCK) * BLOCK, prod(box.size) * itemsize)
    yield box.at + first, box.at + last, region


def _spans(pieces: Iterable[Piece]) -> Iterator[list[Piece]]:
    """Pieces that are read at once, in order of file and offset."""
    span: list[Piece] = []
    stop = 0
    for piece in sorted(pieces, key=lambda piece: (piece.box.file.path, piece.start)):
        joins = span and piece.box.file.path == span[0].box.file.path
        near = piece.start <= stop + _GAP and piece.stop - (span or [piece])[0].start <= CHUNK
        if span and not (joins and near):
            yield span
            span = []
        stop = max(stop, piece.stop) if span else piece.stop
        span.append(piece)
    if span:
        yield span


_scratch = threading.local()


def _fill(storage: Storage, span: Sequence[Piece]) -> None:
    start, stop = span[0].start, max(piece.stop for piece in span)
    memory: torch.Tensor | None = getattr(_scratch, "memory", None)
    if memory is None or memory.numel() < stop - start:
        memory = _scratch.memory = torch.empty(max(stop - start, CHUNK), dtype=torch.uint8)
    view = as_buffer(memory)[: stop - start]
    storage.read(span[0].box.file.path, start, view)
    for piece in span:
        begin, end = piece.start - start, piece.stop - start
        _check(piece, view[begin:end])
        piece.target.copy_(_elements(piece, memory[begin:end]))


def _check(piece: Piece, data: memoryview) -> None:
    """Compare the blocks of a piece with their checksums."""
    if not piece.box.checksums:
        return
    first = (piece.start - piece.box.at) // BLOCK
    for number, begin in enumerate(range(0, len(data), BLOCK), first):
        expected = piece.box.checksums[8 * number : 8 * number + 8]
        if f"{zlib.crc32(data[begin : begin + BLOCK]):08x}" != expected:
            raise CheckpointError(
                f"{piece.name} is damaged in checkpoint file "
                f"{piece.box.file.place}: the checksum of bytes from "
                f"{piece.box.at + number * BLOCK:,} on is not the recorded one"
            )


def _elements(piece: Piece, data: torch.Tensor) -> torch.Tensor:
    """The region of a piece as a view of the bytes that were read for it."""
    if data.storage_offset() % piece.dtype.itemsize:
        data = data.clone()  # the file does not align it
    flat, strides = data.view(piece.dtype), _strides(piece.box.size)
    read_from = (piece.start - piece.box.at) // piece.dtype.itemsize
    offset = flat.storage_offset() + _dot(piece.region[0], strides) - read_from
    return flat.as_strided(_minus(piece.region[1], piece.region[0]), strides, offset)


def _strides(size: Sequence[int]) -> tuple[int, ...]:
    return tuple(prod(size[axis + 1 :]) for axis in range(len(size)))


def _dot(position: Sequence[int], strides: Sequence[int]) -> int:
    return sum(at * stride for at, stride in zip(position, strides, strict=True))


def _minus(a: Sequence[int], b: Sequence[int]) -> tuple[int, ...]:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def _with(position: tuple[int, ...], axis: int, value: int) -> tuple[int, ...]:
    return (*position[:axis], value, *position[axis + 1 :])
