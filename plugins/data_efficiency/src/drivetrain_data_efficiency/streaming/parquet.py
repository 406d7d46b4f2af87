"""Parquet files through pyarrow: rows by number, from row groups that are kept decoded."""

from __future__ import annotations

import logging
import os
from collections import OrderedDict
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from drivetrain.errors import ConfigError, TrainingError
from drivetrain_data_efficiency.streaming.index import ShardIndex, scanned
from drivetrain_data_efficiency.streaming.sharded import SHARDS_OF_A_BLOCK, ShardedDataset

logger = logging.getLogger("drivetrain.data_efficiency")


def _parquet() -> Any:
    try:
        return import_module("pyarrow.parquet")
    except ImportError as error:
        raise ConfigError(
            'Parquet needs the package pyarrow: pip install "drivetrain-data-efficiency[parquet]"'
        ) from error


class ParquetShards(ShardedDataset):
    """Rows of Parquet files by number; what is shuffled as a whole is a row group.

    A sample is a dict of columns; lists of numbers are NumPy arrays.

    Args:
        index: prefix of an index, from :func:`index_shards` or ``drivetrain data index``.
        root: folder or URL of the files; that of the index if ``None``.
        columns: those to read; all if ``None``.
        transform: makes a sample of such a dict.
        lanes: parts that are read side by side; best a multiple of data shards x workers.
        run: samples that a lane gives in turn; best the micro-batch.
        block: samples that are shuffled among each other; those of 4 row groups if ``None``.
        kept: row groups that a process keeps decoded. A block and the next one of each lane that
            it reads have to fit, or groups are decoded again and again, which is logged; 6 if
            ``None``, or more for a larger ``block``.

    Raises:
        ConfigError: no index, an index of something else, no samples, or no ``pyarrow``.
    """

    def __init__(
        self,
        index: str | os.PathLike[str],
        *,
        root: str | os.PathLike[str] | None = None,
        columns: Sequence[str] | None = None,
        transform: Callable[[dict[str, Any]], Any] | None = None,
        lanes: int = 1,
        run: int = 1,
        block: int | None = None,
        kept: int | None = None,
    ) -> None:
        _parquet()
        found = ShardIndex.read(index, "parquet", root)
        counts = np.array(found.rows.flat, np.int64)
        super().__init__(found, counts, lanes=lanes, run=run, block=block)
        self._group_ends = np.cumsum(found.rows.sizes)
        self._columns = None if columns is None else list(columns)
        self._transform = transform
        spread = -(-self.block // max(1, int(counts.mean())))
        self._kept = max(spread, SHARDS_OF_A_BLOCK) + 2 if kept is None else kept
        self._tables: OrderedDict[int, Any] = OrderedDict()
        self._decoded: OrderedDict[int, int] = OrderedDict()
        self._told = False

    def __getitem__(self, number: int) -> Any:
        group, row = self.place(number)
        table = self._table(group)
        sample = {name: _value(table.column(name)[row]) for name in table.column_names}
        return sample if self._transform is None else self._transform(sample)

    def _table(self, group: int) -> Any:
        if self._process != os.getpid():
            self.forget()
        if group in self._tables:
            self._tables.move_to_end(group)
            return self._tables[group]
        shard = int(np.searchsorted(self._group_ends, group, side="right"))
        first = int(self._group_ends[shard] - self.index.rows.sizes[shard])
        name = self.index.path(shard)
        try:
            table = self.file(shard).read_row_group(group - first, columns=self._columns)
        except (OSError, ValueError, KeyError, IndexError) as error:
            raise TrainingError(f"row group {group - first} of {name}: {error}") from error
        if missing := set(self._columns or ()) - set(table.column_names):
            raise TrainingError(f"{name} has no column {', '.join(sorted(missing))}")
        self._note(group)
        self._tables[group] = table
        while len(self._tables) > self._kept:
            self._tables.popitem(last=False)
        return table

    def _note(self, group: int) -> None:
        """Say once if groups are decoded several times in short order."""
        self._decoded[group] = self._decoded.pop(group, 0) + 1
        while len(self._decoded) > 4 * self._kept:
            self._decoded.popitem(last=False)
        if self._decoded[group] > 2 and not self._told:
            self._told = True
            logger.warning(
                "row group %d is decoded for the third time in short order: ParquetShards(kept=%d) "
                "is too small for block=%d and the lanes that a process reads",
                *(group, self._kept, self.block),
            )

    def _opened(self, file: Any, name: str) -> Any:
        return _parquet().ParquetFile(file)

    def forget(self) -> None:
        """See :meth:`ShardedDataset.forget`."""
        super().forget()
        self._tables, self._decoded = OrderedDict(), OrderedDict()

    def __getstate__(self) -> dict[str, Any]:
        empty: Any = {"_tables": OrderedDict(), "_decoded": OrderedDict()}
        return {**super().__getstate__(), **empty}


def _value(scalar: Any) -> Any:
    """A cell as numbers, text or bytes; a list of numbers as an array that may be written."""
    inner = getattr(scalar, "values", None)
    if inner is None or not hasattr(inner, "to_numpy") or inner.null_count:
        return scalar.as_py()
    array = inner.to_numpy(zero_copy_only=False)
    return np.array(array) if array.dtype != object else scalar.as_py()


def scan_parquet(name: str) -> tuple[npt.NDArray[np.int64], int]:
    """Rows of each row group of a Parquet file; and the file's bytes.

    Raises:
        ConfigError: it is none.
    """
    parquet = _parquet()
    with scanned(name) as (file, size):
        try:
            facts = parquet.ParquetFile(file).metadata
        except (OSError, ValueError) as error:
            raise ConfigError(f"the shard {name} is no Parquet file: {error}") from error
        rows = [facts.row_group(number).num_rows for number in range(facts.num_row_groups)]
    return np.array(rows, np.int64), size
