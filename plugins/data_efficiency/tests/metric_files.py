"""Write metric files for tests byte by byte, from the format's description and nothing else."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import Dataset


def write_indexed(prefix: Path, rows: Sequence[Sequence[int]], letter: str, code: int) -> str:
    """Items of one integer type (``struct`` letter, dtype code of the format)."""
    size = struct.calcsize(letter)
    data = b"".join(struct.pack(f"<{len(row)}{letter}", *row) for row in rows)
    offsets, at = [], 0
    for row in rows:
        offsets.append(at)
        at += size * len(row)
    index = b"MMIDIDX\x00\x00" + struct.pack("<QBQQ", 1, code, len(rows), 1)
    index += struct.pack(f"<{len(rows)}i", *map(len, rows))
    index += struct.pack(f"<{len(rows)}q", *offsets) + struct.pack("<q", 0)
    prefix.parent.mkdir(parents=True, exist_ok=True)
    Path(f"{prefix}.bin").write_bytes(data)
    Path(f"{prefix}.idx").write_bytes(index)
    return str(prefix)


def write_metric(folder: Path, name: str, values: Sequence[int]) -> dict[str, str]:
    """The files of a metric; returns the two paths as a config has them."""
    distinct = sorted(set(values))
    rows = [[i for i, value in enumerate(values) if value == each] for each in distinct]
    samples = write_indexed(folder / f"{name}_index_to_sample", rows, "i", 4)
    metric = write_indexed(folder / f"{name}_index_to_metric", [[v] for v in distinct], "q", 5)
    return {"index_to_sample_path": samples, "index_to_metric_path": metric}


class Numbers(Dataset[torch.Tensor]):
    """Sample i is [i, i + 1, ...]; all are of one length."""

    def __init__(self, samples: int, length: int = 8) -> None:
        self.samples, self.length = samples, length

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.arange(index, index + self.length)


class Broken:
    """Fails when a sample is loaded."""

    def __len__(self) -> int:
        return 10**8

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("nothing is to be loaded")
