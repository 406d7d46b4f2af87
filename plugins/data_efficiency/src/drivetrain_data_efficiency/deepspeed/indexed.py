"""``deepspeed.runtime.data_pipeline.data_sampling.indexed_dataset``."""

from __future__ import annotations

from typing import Any

import numpy as np

from drivetrain.errors import ConfigError
from drivetrain_data_efficiency.analysis import indexed
from drivetrain_data_efficiency.analysis.indexed import (
    IndexedDataset,
    IndexedWriter,
    smallest_dtype,
)


class MMapIndexedDataset(IndexedDataset):
    """An indexed data set; ``skip_warmup`` has no effect, as nothing is read ahead."""

    def __init__(self, path: str, skip_warmup: bool = False, codes: Any = None) -> None:
        super().__init__(path, codes)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, True, self._codes)


MMapIndexedDatasetBuilder = IndexedWriter


def data_file_path(prefix_path: str) -> str:
    """The file with the items."""
    return str(indexed.data_file(prefix_path))


def index_file_path(prefix_path: str) -> str:
    """The file with their places."""
    return str(indexed.index_file(prefix_path))


def dataset_exists(path: str, impl: str = "mmap") -> bool:
    """Whether both files are there."""
    return indexed.exists(path)


def infer_dataset_impl(path: str) -> str | None:
    """``"mmap"`` if the index is of that format, else ``None``."""
    file = indexed.index_file(path)
    if not file.is_file():
        return None
    with file.open("rb") as opened:
        return "mmap" if opened.read(len(indexed.MAGIC)) == indexed.MAGIC else None


def make_dataset(path: str, impl: str = "infer", skip_warmup: bool = False) -> MMapIndexedDataset:
    """Open an indexed data set.

    Raises:
        ConfigError: it is not in the mmap format; the older one is not read.
    """
    if impl not in ("mmap", "infer"):
        raise ConfigError(
            f"the format {impl!r} of indexed data sets is not read; write it again as mmap"
        )
    return MMapIndexedDataset(path, skip_warmup)


def make_builder(out_file: str, impl: str = "mmap", vocab_size: int | None = None) -> IndexedWriter:
    """A writer whose integers are as small as ``vocab_size`` allows (int32 at most)."""
    if impl != "mmap":
        raise ConfigError(f"the format {impl!r} of indexed data sets is not written; use mmap")
    small = vocab_size is not None and vocab_size < 65500
    return IndexedWriter(out_file, np.uint16 if small else np.int32)


def find_fit_int_dtype(min_value: int, max_value: int) -> Any:
    """The smallest integer dtype that has both numbers."""
    return smallest_dtype(min_value, max_value)


def create_mmap_dataset_builder(fname: str, dtype: Any) -> IndexedWriter:
    """A writer for the prefix ``fname``."""
    return IndexedWriter(indexed.data_file(fname), dtype)


def close_mmap_dataset_builder(builder: IndexedWriter, fname: str) -> None:
    """Write the index of the prefix ``fname``."""
    builder.end_document()
    builder.finalize(indexed.index_file(fname))
