"""What differs between two checkpoints."""

from __future__ import annotations

from dataclasses import dataclass
from math import isfinite

import torch

from drivetrain.checkpoint.format.index import Stored, StoredTensor
from drivetrain.checkpoint.format.reading import read_whole
from drivetrain.checkpoint.format.tensor_file import NAMES, raw_bytes
from drivetrain.checkpoint.opening import check_files


@dataclass(frozen=True)
class Difference:
    """One tensor that is not the same.

    Args:
        kind: of the tensor.
        name: of the tensor.
        what: ``"only in A"``, ``"only in B"``, or what differs.
        elements: how many elements differ, where both have the same shape.
        largest: the largest difference of two elements; ``None`` where there is none, such as
            between numbers and what is no number.
    """

    kind: str
    name: str
    what: str
    elements: int | None = None
    largest: float | None = None


def diff(a: Stored, b: Stored) -> list[Difference]:
    """Tensors that differ, by kind and name; the bits count.

    Two tensors are in memory at a time.

    Raises:
        CheckpointError: one of the two is damaged.
    """
    for stored in (a, b):
        check_files(stored)
    found = []
    for kind, name in sorted(set(a.keys) | set(b.keys)):
        one, other = a.find(kind, name), b.find(kind, name)
        if one is None or other is None:
            found.append(Difference(kind, name, "only in B" if one is None else "only in A"))
        elif one.shape != other.shape:
            what = f"shape {list(one.shape)} in A, {list(other.shape)} in B"
            found.append(Difference(kind, name, what))
        else:
            found += _compare(kind, name, (a, one), (b, other))
    return found


def _compare(
    kind: str, name: str, one: tuple[Stored, StoredTensor], other: tuple[Stored, StoredTensor]
) -> list[Difference]:
    x, y = (read_whole(stored.storage, tensor) for stored, tensor in (one, other))
    if x.dtype == y.dtype and torch.equal(raw_bytes(x), raw_bytes(y)):
        return []
    what = "values"
    if x.dtype != y.dtype:
        what = f"{NAMES[x.dtype]} in A, {NAMES[y.dtype]} in B"
    wide, wider = x.double(), y.double()
    differs = ~((wide == wider) | (wide.isnan() & wider.isnan()))
    elements = int(differs.sum())
    largest = float((wide - wider).abs()[differs].max()) if elements else 0.0
    return [Difference(kind, name, what, elements, largest if isfinite(largest) else None)]
