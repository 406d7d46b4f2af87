"""Reading all of a checkpoint to see whether it is what was saved."""

from __future__ import annotations

import zlib
from collections.abc import Iterator
from math import prod

from drivetrain.checkpoint.format.index import Stored, StoredBox, StoredTensor
from drivetrain.checkpoint.format.safetensors_file import read_header
from drivetrain.checkpoint.format.tensor_file import BLOCK
from drivetrain.checkpoint.load import check_file
from drivetrain.errors import CheckpointError

_CHUNK = 16 * BLOCK


def verify(stored: Stored) -> list[str]:
    """Everything that is wrong with a checkpoint; nothing when it is whole.

    Every byte of every rank's file is read and compared with its checksum, and the boxes of every
    tensor are compared with its shape.
    """
    problems: list[str] = []
    for rank in range(stored.world_size):
        try:
            check_file(stored, rank)
            read_header(stored.storage, stored.file(rank).path)
        except (CheckpointError, OSError) as error:
            problems.append(str(error))
    for tensor in _tensors(stored, problems):
        try:
            boxes = [tensor.box(number) for number in range(len(tensor))]
            _check_cover(tensor, boxes)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        for box in boxes:
            problems += _damage(stored, tensor, box)
    return list(dict.fromkeys(problems))


def _tensors(stored: Stored, problems: list[str]) -> Iterator[StoredTensor]:
    for kind, name in stored.keys:
        try:
            found = stored.find(kind, name)
            assert found is not None
            yield found
        except CheckpointError as error:
            problems.append(str(error))
    for rank in range(stored.world_size):
        try:
            yield from stored.own(rank).values()
        except CheckpointError as error:
            problems.append(str(error))


def _check_cover(tensor: StoredTensor, boxes: list[StoredBox]) -> None:
    """Boxes make up their tensor: none overlap, and as many elements as it has."""
    missing = prod(tensor.shape) - sum(prod(box.size) for box in boxes)
    if missing > 0:
        raise CheckpointError(f"{tensor.name} lacks {missing:,} of its elements")
    if not tensor.is_whole():
        raise CheckpointError(f"{tensor.name} has elements that are stored twice")


def _damage(stored: Stored, tensor: StoredTensor, box: StoredBox) -> Iterator[str]:
    """Blocks whose checksum is another."""
    nbytes = prod(box.size) * tensor.dtype.itemsize
    memory = memoryview(bytearray(min(nbytes, _CHUNK)))
    for start in range(0, nbytes, _CHUNK):
        data = memory[: min(_CHUNK, nbytes - start)]
        try:
            stored.storage.read(box.file.path, box.at + start, data)
        except (CheckpointError, OSError) as error:
            yield str(error)
            return
        for at in range(0, len(data), BLOCK):
            number = (start + at) // BLOCK
            expected = box.checksums[8 * number : 8 * number + 8]
            if f"{zlib.crc32(data[at : at + BLOCK]):08x}" != expected:
                yield (
                    f"{tensor.name} is damaged in {box.file.place}: the checksum of bytes from "
                    f"{box.at + start + at:,} on is not the recorded one"
                )
                return
