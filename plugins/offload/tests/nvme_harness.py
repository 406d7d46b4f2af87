"""Buckets of many tiles, in files and on the device."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from drivetrain_offload.files.home import nvme_homes
from drivetrain_offload.section import Aio, OffloadOptimizer
from offload_harness import spec_of

from drivetrain.contracts import BucketSpec, Segment, StateHome, UpdateRule
from drivetrain.job.job import Job

TILE = 4096
LARGE: Sequence[tuple[int, ...]] = ((97, 83), (1,), (3001,), (64, 33))  # 14,165 elements: 4 tiles


def large_spec(
    rule: UpdateRule, precision: str = "bf16", key: str = "b0", padding: int = 5
) -> BucketSpec:
    """A bucket whose tensors cross the borders of tiles."""
    segments, offset = [], 0
    for number, shape in enumerate(LARGE):
        numel = torch.Size(shape).numel()
        segments.append(Segment(f"{key}.p{number}", shape, 0, numel, offset))
        offset += numel
    small = spec_of(rule, precision, key)
    return replace(small, numel=offset + padding, segments=tuple(segments))


def in_files(
    job: Job, specs: Sequence[BucketSpec], folder: Path, **section: Any
) -> list[StateHome]:
    """Homes in files, with small tiles."""
    given = {"device": "nvme", "nvme_path": str(folder), "buffer_size": TILE, **section}
    return nvme_homes(job, specs, OffloadOptimizer.model_validate(given), Aio())


def files_in(folder: Path) -> list[Path]:
    """All files under a folder but locks."""
    return [path for path in folder.rglob("*") if path.is_file() and path.name != "lock"]
