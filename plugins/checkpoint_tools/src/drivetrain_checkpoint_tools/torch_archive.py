"""Files of ``torch.save``, read without running what they say, and no larger than they are."""

from __future__ import annotations

import mmap
import os
import warnings
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import torch

from drivetrain.checkpoint.format.index import MALFORMED
from drivetrain.checkpoint.format.storage import LocalStorage
from drivetrain.errors import CheckpointError
from drivetrain_checkpoint_tools.plain_pickle import Inert, RefusedError, key_of, load_plain

_CHUNK = 4 << 20
_LOCAL_HEADER = 30
_MOST_DIMENSIONS = 64
_EXPANDED = 16 << 20
"""Bytes that views of a file's tensors may have beyond what the file has; masks are expanded."""

_VIEWS = 4
"""How often one byte may be in different views; ZeRO saves flat tensors and views of them."""


class LossScaler(Inert):
    """Stands in for a loss scaler."""


class FragmentAddress(Inert):
    """Where a parameter's part lies in a partition: ``start`` and ``numel``."""


@dataclass(frozen=True)
class _Type:
    """Stands in for a class of storages; only its dtype counts. ``None`` for bytes."""

    dtype: torch.dtype | None

    def __call__(self, *_: Any) -> Any:
        raise RefusedError("a storage that is not in the archive")


@dataclass(frozen=True)
class _Storage:
    """A storage of the archive.

    Args:
        key: its name.
        data: its bytes [n].
        dtype: of its elements; ``None`` for bytes.
    """

    key: str
    data: torch.Tensor
    dtype: torch.dtype | None


_STORAGES = {
    "Double": torch.float64,
    "Float": torch.float32,
    "Half": torch.float16,
    "BFloat16": torch.bfloat16,
    "Long": torch.int64,
    "Int": torch.int32,
    "Short": torch.int16,
    "Char": torch.int8,
    "Byte": torch.uint8,
    "Bool": torch.bool,
    "ComplexFloat": torch.complex64,
    "ComplexDouble": torch.complex128,
}
_DTYPES = {
    f"torch {name}": value for name, value in vars(torch).items() if isinstance(value, torch.dtype)
}
_PREFIX = "deepspeed"


@dataclass(frozen=True)
class Pickled:
    """What a file holds.

    Args:
        content: its dict; tensors are mapped, so they take memory when they are used.
        pickle_bytes: length of its pickle, which holds all but the numbers of tensors.
        nbytes: length of the file.
    """

    content: dict[str, Any]
    pickle_bytes: int
    nbytes: int


def read_pickled(
    storage: LocalStorage, name: str, *, tensor: bool = False, check: bool = True
) -> Pickled:
    """The dict in a file of ``torch.save``.

    Args:
        storage: the folder.
        name: of the file in it.
        tensor: the file may hold anything but a dict, which becomes that of ``"param"``.
        check: compare all with its checksums; once is enough.

    Raises:
        CheckpointError: missing, damaged, or it holds anything but tensors, plain data, and objects
            of DeepSpeed's that are known here.
    """
    place = storage.where(name)
    try:
        descriptor = storage.open(name)
    except FileNotFoundError:
        raise CheckpointError(f"file {place} is missing") from None
    try:
        archive = _Archive(descriptor, place, check=check)
        value = archive.value()
    except RefusedError as error:
        raise CheckpointError(
            f"file {place} holds what is not loaded for safety: {_line(error)}"
        ) from error
    except MALFORMED as error:
        raise CheckpointError(f"file {place} is damaged: {_line(error)}") from error
    finally:
        os.close(descriptor)
    if not isinstance(value, dict) and tensor:
        value = {"param": value}
    if not isinstance(value, dict):
        raise CheckpointError(f"file {place} holds a {type(value).__name__}, expected a dict")
    return Pickled(value, archive.pickle_bytes, archive.nbytes)


def _line(error: BaseException) -> str:
    """The first line of an error, in printable characters and not without end."""
    text = str(error).strip().partition("\n")[0][:200]
    named = text if text and not isinstance(error, LookupError) else repr(error)[:200]
    return named if named.isprintable() else repr(named)


class _Archive:
    """An open archive: where its records lie, what its pickle says, and its tensors."""

    def __init__(self, descriptor: int, place: str, *, check: bool) -> None:
        self.nbytes = os.fstat(descriptor).st_size
        self.pickle_bytes = 0
        self._descriptor = descriptor
        self._records = self._find_records(place)
        if check:
            self._check_sums(place)
        self._folder = self._find_folder()
        # Read-only, so that a large file needs no memory in reserve; nobody writes to its tensors.
        self._mapped = mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
        self._storages: dict[str, torch.Tensor] = {}
        self._views: set[tuple[Any, ...]] = set()
        self._viewed = 0

    def value(self) -> Any:
        """What the pickle holds."""
        data = self._bytes("data.pkl")
        self.pickle_bytes = len(data)
        order = self._bytes("byteorder") if "byteorder" in self._names() else b"little"
        if order != b"little":
            raise RefusedError("numbers in another byte order")
        return load_plain(data, self._known(), self._storage)

    # -- the archive -------------------------------------------------------------------------------

    def _find_records(self, place: str) -> dict[str, tuple[int, int, int]]:
        """Name -> offset, length and checksum of all records; none overlap."""
        try:
            with (
                os.fdopen(os.dup(self._descriptor), "rb") as file,
                zipfile.ZipFile(file) as archive,
            ):
                entries = archive.infolist()
        except (zipfile.BadZipFile, OSError, EOFError, *MALFORMED) as error:
            raise CheckpointError(
                f"file {place} is damaged, or no file of torch.save since 1.6: {_line(error)}"
            ) from error
        if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
            raise CheckpointError(f"file {place} is compressed, which torch.save never does")
        found: dict[str, tuple[int, int, int]] = {}
        end = 0
        for entry in sorted(entries, key=lambda entry: entry.header_offset):
            start = self._data_offset(entry.header_offset)
            if entry.flag_bits & 1 or entry.filename in found or entry.header_offset < end:
                raise ValueError("records that are encrypted, doubled or lie over others")
            end = start + entry.file_size
            if end > self.nbytes:
                raise ValueError(f"it claims to hold more than its {self.nbytes:,} bytes")
            found[entry.filename] = (start, entry.file_size, entry.CRC)
        return found

    def _data_offset(self, header: int) -> int:
        head = os.pread(self._descriptor, _LOCAL_HEADER, header) if header >= 0 else b""
        if len(head) < _LOCAL_HEADER or head[:4] != b"PK\x03\x04":
            raise ValueError("a record that is not where it should be")
        name, extra = (int.from_bytes(head[at : at + 2], "little") for at in (26, 28))
        return header + _LOCAL_HEADER + name + extra

    def _check_sums(self, place: str) -> None:
        memory = memoryview(bytearray(_CHUNK))
        for name, (start, length, expected) in self._records.items():
            crc = 0
            for at in range(0, length, _CHUNK):
                chunk = memory[: min(_CHUNK, length - at)]
                if os.preadv(self._descriptor, [chunk], start + at) != len(chunk):
                    raise ValueError("it is shorter than it was")
                crc = zlib.crc32(chunk, crc)
            if crc != expected:
                raise CheckpointError(
                    f"file {place} is damaged: the checksum of {name[:100]!r} is not the recorded "
                    "one"
                )

    def _find_folder(self) -> str:
        """What stands before the names of all records."""
        folders = [name.removesuffix("data.pkl") for name in self._records if self._is_pickle(name)]
        if len(folders) != 1:
            raise ValueError("it has no data.pkl, or several")
        return folders[0]

    @staticmethod
    def _is_pickle(name: str) -> bool:
        return name.endswith("/data.pkl") and name.count("/") == 1

    def _names(self) -> set[str]:
        return {name.removeprefix(self._folder) for name in self._records}

    def _bytes(self, name: str) -> bytes:
        start, length, _ = self._records[self._folder + name]
        return self._mapped[start : start + length]

    # -- tensors -----------------------------------------------------------------------------------

    def _known(self) -> dict[str, Any]:
        """What pickles may name, and what takes its place."""
        return {
            **{f"torch {name}Storage": _Type(dtype) for name, dtype in _STORAGES.items()},
            "torch.storage UntypedStorage": _Type(None),
            **_DTYPES,
            "collections OrderedDict": _dict,
            "collections defaultdict": _dict,
            **dict.fromkeys(("builtins set", "__builtin__ set"), _set),
            "_codecs encode": _encoded,
            "torch Size": _shape,
            "torch device": Inert,
            "argparse Namespace": Inert,  # the arguments of Megatron's scripts
            "torch._utils _rebuild_tensor": self._tensor,
            "torch._utils _rebuild_tensor_v2": self._tensor,
            "torch._utils _rebuild_tensor_v3": self._tensor_of_dtype,
            "torch._tensor _rebuild_from_type_v2": self._of_type,
            "torch Tensor": Inert,
            "torch.nn.parameter Parameter": Inert,
            "torch._utils _rebuild_parameter": _first,
            "torch._utils _rebuild_parameter_with_state": _first,
            f"{_PREFIX}.runtime.fp16.loss_scaler LossScaler": LossScaler,
            f"{_PREFIX}.runtime.fp16.loss_scaler DynamicLossScaler": LossScaler,
            f"{_PREFIX}.utils.tensor_fragment fragment_address": FragmentAddress,
            f"{_PREFIX}.runtime.zero.config ZeroStageEnum": _whole_number,
        }

    def _storage(self, identity: Any) -> _Storage:
        word, kind, key, _, count = identity
        if word != "storage" or not isinstance(kind, _Type) or not isinstance(key, str):
            raise RefusedError("something outside of the file that is no storage")
        start, length, _ = self._records[f"{self._folder}data/{key}"]
        itemsize = kind.dtype.itemsize if kind.dtype else 1
        if type(count) is not int or not 0 <= count * itemsize <= length:
            raise ValueError(f"storage {key[:100]!r} claims more than its {length:,} bytes")
        if key not in self._storages:
            self._storages[key] = self._map(start, length)
        return _Storage(key, self._storages[key][: count * itemsize], kind.dtype)

    def _map(self, start: int, length: int) -> torch.Tensor:
        if not length:
            return torch.empty(0, dtype=torch.uint8)
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="The given buffer is not writable")
            data = torch.frombuffer(self._mapped, dtype=torch.uint8, count=length, offset=start)
        return data if start % 16 == 0 else data.clone()

    def _tensor(self, storage: Any, offset: Any, size: Any, stride: Any, *_: Any) -> torch.Tensor:
        if not isinstance(storage, _Storage) or storage.dtype is None:
            raise RefusedError("a tensor of no storage")
        return self._view(storage, storage.dtype, offset, _shape(size), _shape(stride))

    def _tensor_of_dtype(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        _: Any,
        __: Any,
        dtype: Any,
        *___: Any,
    ) -> torch.Tensor:
        if not isinstance(storage, _Storage) or not isinstance(dtype, torch.dtype):
            raise RefusedError("a tensor of no storage")
        return self._view(storage, dtype, offset, _shape(size), _shape(stride))

    def _of_type(self, function: Any, _: Any, arguments: Any, __: Any) -> torch.Tensor:
        if function != self._tensor:
            raise RefusedError("a tensor of a class of its own")
        return self._tensor(*arguments)

    def _view(
        self,
        storage: _Storage,
        dtype: torch.dtype,
        offset: int,
        size: tuple[int, ...],
        stride: tuple[int, ...],
    ) -> torch.Tensor:
        count, nbytes = storage.data.numel() // dtype.itemsize, prod(size) * dtype.itemsize
        _shape((offset,))
        last = offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True))
        if (nbytes and last >= count) or offset > count:
            raise ValueError(f"a tensor of shape {list(size[:8])} reaches out of its storage")
        place = (storage.key, dtype, offset, size, stride)
        if place not in self._views:
            self._views.add(place)
            self._viewed += nbytes
        if self._viewed > _VIEWS * self.nbytes + _EXPANDED:
            raise ValueError(
                f"a tensor of shape {list(size[:8])} is expanded: tensors claim {self._viewed:,} "
                f"bytes, the file has {self.nbytes:,}"
            )
        flat = storage.data[: count * dtype.itemsize].view(dtype)
        return flat.as_strided(size, stride, offset)


# -- what pickles may call -------------------------------------------------------------------------


def _dict(items: Sequence[Any] | None = None) -> dict[Any, Any]:
    return {key_of(key): value for key, value in items or ()}


def _set(values: Sequence[Any] = ()) -> set[Any]:
    return {*map(key_of, values)}


def _encoded(text: str, encoding: str = "latin1") -> bytes:
    if encoding != "latin1":
        raise RefusedError(f"encoding {encoding[:20]!r}")
    return text.encode("latin1")


def _first(value: torch.Tensor, *_: Any) -> torch.Tensor:
    return value


def _whole_number(value: int) -> int:
    return _shape((value,))[0]


def _shape(values: Sequence[Any] = ()) -> tuple[int, ...]:
    if not isinstance(values, (tuple, list)) or not all(
        type(n) is int and 0 <= n < 1 << 60 for n in values
    ):
        raise ValueError("a shape that is none")
    if len(values) > _MOST_DIMENSIONS:
        raise ValueError(f"a shape of {len(values):,} dimensions")
    return tuple(values)
