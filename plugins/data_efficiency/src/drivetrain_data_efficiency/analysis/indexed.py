r"""Megatron's indexed data set: many arrays of one dtype in a file, read through memory maps.

``<prefix>.bin`` has the items one after another. ``<prefix>.idx`` has, little endian: the magic
``MMIDIDX\\0\\0``, version (u64, 1), dtype code (u8), items (u64), entries of the document index
(u64), sizes (i32 [items]), offsets in bytes (i64 [items]), and the document index (i64).
"""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from drivetrain.errors import ConfigError, TrainingError

MAGIC = b"MMIDIDX\x00\x00"
_HEAD = struct.Struct("<QBQQ")

CODES: dict[int, Any] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.float64,
    7: np.float32,
    8: np.uint16,
}
"""Megatron's dtype codes, as Megatron-LM writes them."""

DEEPSPEED_CODES: dict[int, Any] = {
    1: np.uint8,
    2: np.int8,
    3: np.int16,
    4: np.int32,
    5: np.int64,
    6: np.uint16,
    7: np.uint32,
    8: np.uint64,
}
"""DeepSpeed's, which differ from 6 on; the analyzer's files have these."""

Array = npt.NDArray[Any]


def data_file(prefix: str | os.PathLike[str]) -> Path:
    """The file with the items."""
    return Path(f"{os.fspath(prefix)}.bin")


def index_file(prefix: str | os.PathLike[str]) -> Path:
    """The file with their sizes and places."""
    return Path(f"{os.fspath(prefix)}.idx")


def exists(prefix: str | os.PathLike[str]) -> bool:
    """Whether both files are there."""
    return data_file(prefix).is_file() and index_file(prefix).is_file()


def smallest_dtype(low: int, high: int) -> Any:
    """The smallest integer dtype that has both numbers, unsigned if it can be."""
    kinds = (np.uint8, np.uint16, np.uint32, np.uint64)
    signed = (np.int8, np.int16, np.int32, np.int64)
    for kind in kinds if low >= 0 else signed:
        if np.iinfo(kind).min <= low and high <= np.iinfo(kind).max:
            return kind
    raise TrainingError(f"no integer type has both {low} and {high}")


class IndexedDataset(Sequence[Array]):
    """Reads an indexed data set; nothing is read before it is asked for.

    Opening takes the same time and memory whatever the number of items. Pickles as its path.

    Args:
        prefix: path without ``.bin`` and ``.idx``.
        codes: meaning of dtype codes; DeepSpeed's by default.

    Raises:
        ConfigError: a file is missing, of another format, or cut off.
    """

    def __init__(self, prefix: str | os.PathLike[str], codes: dict[int, Any] | None = None) -> None:
        self.path = os.fspath(prefix)
        self._codes = DEEPSPEED_CODES if codes is None else codes
        index, data = index_file(prefix), data_file(prefix)
        for file in (index, data):
            if not file.is_file():
                raise ConfigError(f"{self.path} is no indexed data set: there is no {file}")
        with index.open("rb") as opened:
            head = opened.read(len(MAGIC) + _HEAD.size)
        if not head.startswith(MAGIC):
            raise ConfigError(f"{index} is not in the mmap format (it begins with {head[:9]!r})")
        if len(head) < len(MAGIC) + _HEAD.size:
            raise ConfigError(f"{index} is cut off: it has {len(head)} bytes")
        version, code, items, documents = _HEAD.unpack_from(head, len(MAGIC))
        if version != 1 or code not in self._codes:
            raise ConfigError(f"{index} has version {version} and dtype code {code}: not known")
        self.dtype = np.dtype(self._codes[code])
        want = len(head) + 12 * items + 8 * documents
        if index.stat().st_size != want:
            raise ConfigError(
                f"{index} is damaged: {want} bytes of {items} items, found {index.stat().st_size}"
            )
        self.sizes = _mapped(index, np.dtype("<i4"), len(head), items)
        self.offsets = _mapped(index, np.dtype("<i8"), len(head) + 4 * items, items)
        self._documents = _mapped(index, np.dtype("<i8"), len(head) + 12 * items, documents)
        length = data.stat().st_size
        if items and int(self.offsets[-1]) + int(self.sizes[-1]) * self.dtype.itemsize > length:
            raise ConfigError(f"{data} is cut off: it has {length} bytes")
        self.flat = _mapped(data, self.dtype, 0, length // self.dtype.itemsize)
        """All items, one after another."""

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> Array: ...
    @overload
    def __getitem__(self, index: slice) -> Any: ...

    def __getitem__(self, index: int | slice) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError("slices of an indexed data set are contiguous")
            return [self.get(i) for i in range(start, stop)]
        return self.get(index)

    def get(self, index: int, offset: int = 0, length: int | None = None) -> Array:
        """Part of an item, without a copy.

        Args:
            index: of the item.
            offset: elements to leave out at its beginning.
            length: elements; the rest of the item if ``None``.
        """
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no item {index} of {len(self)}")
        begin = int(self.offsets[index]) // self.dtype.itemsize
        size = int(self.sizes[index])
        end = size if length is None else min(size, offset + length)
        found: Array = self.flat[begin + offset : begin + end]
        return found

    def size(self, index: int) -> int:
        """Elements of an item."""
        return int(self.sizes[index])

    @property
    def doc_idx(self) -> Array:
        """First item of every document, and the number of items."""
        return self._documents

    def get_doc_idx(self) -> Array:
        """See :attr:`doc_idx`."""
        return self._documents

    def set_doc_idx(self, documents: Array) -> None:
        """Show another document index; the file stays as it is."""
        self._documents = documents

    @property
    def supports_prefetch(self) -> bool:
        """False: the system reads ahead."""
        return False

    @staticmethod
    def exists(path: str) -> bool:
        """Whether there is an indexed data set of this prefix."""
        return exists(path)

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.path, self._codes)


def _mapped(file: Path, dtype: np.dtype[Any], offset: int, count: int) -> Array:
    if not count:
        return np.empty(0, dtype)  # nothing can be mapped of an empty file
    return np.memmap(file, dtype=dtype, mode="r", offset=offset, shape=(count,))


class IndexedWriter:
    """Writes an indexed data set; the index comes last, so a cut-off write leaves none.

    Args:
        path: of the ``.bin`` file.
        dtype: of all items.
        codes: meaning of dtype codes; DeepSpeed's by default.
    """

    def __init__(
        self, path: str | os.PathLike[str], dtype: Any = np.int64, codes: Any = None
    ) -> None:
        self._dtype = np.dtype(dtype)
        table = DEEPSPEED_CODES if codes is None else codes
        found = [code for code, kind in table.items() if np.dtype(kind) == self._dtype]
        if not found:
            raise TrainingError(f"the format has no code for {self._dtype}")
        self._code = found[0]
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        self._file = Path(path).open("wb")  # noqa: SIM115 - closed by finalize
        self._sizes: list[Array] = []
        self._documents = [0]
        self._count = 0

    def add_item(self, item: Any) -> None:
        """Append one item: a tensor, an array or a list of numbers."""
        self.add_flat(np.asarray(item).reshape(-1), [np.asarray(item).size])

    def add_item_numpy(self, item: Array) -> None:
        """Append one item."""
        self.add_item(item)

    def add_items(self, items: Iterable[Any]) -> None:
        """Append items one by one."""
        for item in items:
            self.add_item(item)

    def add_flat(self, flat: Array, sizes: Any) -> None:
        """Append many items at once.

        Args:
            flat: their elements, one after another.
            sizes: elements of each.
        """
        self._file.write(np.ascontiguousarray(flat, dtype=self._dtype).tobytes())
        self._sizes.append(np.asarray(sizes, dtype=np.int32))
        self._count += len(self._sizes[-1])

    def end_document(self) -> None:
        """Say that the items since the last call are one document."""
        self._documents.append(self._count)

    def merge_file_(self, prefix: str | os.PathLike[str]) -> None:
        """Append another data set of the same dtype, its documents too.

        Raises:
            ConfigError: it has another dtype.
        """
        other = IndexedDataset(prefix)
        if other.dtype != self._dtype:
            raise ConfigError(f"{prefix} has {other.dtype}, and {self._dtype} is written")
        begin = self._count
        for start in range(0, len(other.flat), 1 << 24):
            self._file.write(other.flat[start : start + (1 << 24)].tobytes())
        self._sizes.append(np.array(other.sizes))
        self._count += len(other)
        self._documents += [begin + int(entry) for entry in other.doc_idx[1:]]

    def finalize(self, path: str | os.PathLike[str]) -> None:
        """Write the index to ``path`` (the ``.idx`` file) and close both."""
        self._file.close()
        sizes = np.concatenate(self._sizes) if self._sizes else np.empty(0, np.int32)
        offsets = np.zeros(len(sizes), np.dtype("<i8"))
        np.cumsum(sizes[:-1].astype(np.int64) * self._dtype.itemsize, out=offsets[1:])
        documents = np.array(self._documents, np.dtype("<i8"))
        part = Path(f"{os.fspath(path)}.part")
        with part.open("wb") as file:
            file.write(MAGIC + _HEAD.pack(1, self._code, len(sizes), len(documents)))
            for array in (sizes.astype("<i4"), offsets, documents):
                file.write(array.tobytes())
        part.replace(path)


def write_rows(prefix: str | os.PathLike[str], flat: Array, sizes: Any, dtype: Any) -> None:
    """Write an indexed data set at once; see :meth:`IndexedWriter.add_flat`."""
    writer = IndexedWriter(data_file(prefix), dtype)
    writer.add_flat(flat, sizes)
    writer.finalize(index_file(prefix))
