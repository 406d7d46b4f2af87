"""From a value for every sample to the files by which a curriculum opens samples."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from drivetrain.errors import TrainingError
from drivetrain_data_efficiency.analysis.indexed import smallest_dtype, write_rows

Array = npt.NDArray[Any]

MERGED_ROWS = 100
"""Rows of the merged index, about."""


def write_values(folder: Path, name: str, values: Array, samples: Array | None = None) -> None:
    """Write the four files of a metric with a value for each sample.

    ========================================  ===================================================
    ``<name>_sample_to_metric``               the value of each sample, a row each
    ``<name>_index_to_metric``                distinct values, rising, a row each
    ``<name>_index_to_sample``                samples of each of these values, rising
    ``<name>_index_to_sample_percentile_merged``  the same, rows joined until there are about 100
    ========================================  ===================================================

    Args:
        folder: of the metric.
        name: of the metric.
        values: [samples], whole numbers.
        samples: [samples], numbers of the samples that the values are of; 0, 1, ... by default.
    """
    if values.dtype.kind not in "iu":
        raise TrainingError(f"the metric {name} is {values.dtype}; whole numbers are written")
    total = len(values)
    dtype = smallest_dtype(int(values.min()), int(values.max()))
    values = values.astype(dtype, copy=False)
    order = np.argsort(values, kind="stable")
    ranked = values[order]
    starts = np.flatnonzero(np.concatenate([[True], ranked[1:] != ranked[:-1]]))
    sizes = np.diff(np.append(starts, total))
    if sizes.max() >= 2**31:
        raise TrainingError(f"the metric {name} has a value of {sizes.max()} samples: too many")
    numbers = order if samples is None else samples[order]
    kind = smallest_dtype(0, int(numbers.max()))
    numbers = numbers.astype(kind)
    by_sample = values if samples is None else values[np.argsort(samples, kind="stable")]
    write_rows(folder / f"{name}_sample_to_metric", by_sample, np.ones(total, np.int32), dtype)
    distinct = ranked[starts]
    write_rows(folder / f"{name}_index_to_metric", distinct, np.ones(len(starts), np.int32), dtype)
    write_rows(folder / f"{name}_index_to_sample", numbers, sizes, kind)
    merged = folder / f"{name}_index_to_sample_percentile_merged"
    write_rows(merged, numbers, merged_sizes(sizes, total), kind)


def merged_sizes(sizes: Array, total: int) -> Array:
    """Join rows until each has at least a hundredth of all samples; the last may have less."""
    ends = np.cumsum(sizes)
    share = max(1, total // MERGED_ROWS)
    kept, last = [], 0
    while last < total:
        row = min(int(np.searchsorted(ends, last + share)), len(ends) - 1)
        kept.append(int(ends[row]) - last)
        last = int(ends[row])
    return np.array(kept, np.int64)


def write_sum(folder: Path, name: str, vector: Array) -> None:
    """Write ``<name>_metric_value``, one row with the vector."""
    vector = np.asarray(vector).reshape(-1)
    write_rows(folder / f"{name}_metric_value", vector, [len(vector)], np.int64)
