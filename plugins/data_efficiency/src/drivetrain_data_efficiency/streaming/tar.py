"""Tar shards in the layout of WebDataset: files of one sample follow each other, by their names."""

from __future__ import annotations

import io
import os
import tarfile
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

import numpy as np
import numpy.typing as npt

from drivetrain.errors import ConfigError, TrainingError
from drivetrain_data_efficiency.streaming.index import ShardIndex, scanned
from drivetrain_data_efficiency.streaming.sharded import ShardedDataset

_BLOCK = tarfile.BLOCKSIZE


def _webdataset(module: str) -> Any:
    try:
        return import_module(f"webdataset.{module}")
    except ImportError as error:
        raise ConfigError(
            "tar shards need the package webdataset: pip install "
            '"drivetrain-data-efficiency[webdataset]"'
        ) from error


class TarShards(ShardedDataset):
    """Samples of WebDataset's tar files by number: one read of consecutive bytes for each.

    A sample is a dict: ``__key__``, and for each of its files the extension and the bytes, or what
    WebDataset's decoders make of them.

    Args:
        index: prefix of an index, from :func:`index_shards` or ``drivetrain data index``.
        root: folder or URL of the files; that of the index if ``None``.
        decode: True for WebDataset's basic decoders (text, numbers, JSON, NumPy), a sequence of its
            handlers such as ``"torchrgb"``, or False for bytes. Pickles are not opened.
        transform: makes a sample of such a dict.
        lanes: parts that are read side by side; best a multiple of data shards x workers.
        run: samples that a lane gives in turn; best the micro-batch.
        block: samples that are shuffled among each other; those of 4 shards if ``None``.

    Raises:
        ConfigError: no index, an index of something else, no samples, or no ``webdataset``.
    """

    def __init__(
        self,
        index: str | os.PathLike[str],
        *,
        root: str | os.PathLike[str] | None = None,
        decode: Any = True,
        transform: Callable[[dict[str, Any]], Any] | None = None,
        lanes: int = 1,
        run: int = 1,
        block: int | None = None,
    ) -> None:
        found = ShardIndex.read(index, "tar", root)
        counts = np.maximum(np.asarray(found.rows.sizes, np.int64) - 1, 0)
        super().__init__(found, counts, lanes=lanes, run=run, block=block)
        self._group = _webdataset("tariterators").group_by_keys
        self._handlers = decode
        self._decode: Any = None
        self._transform = transform

    def __getitem__(self, number: int) -> Any:
        shard, row = self.place(number)
        begin, end = (int(place) for place in self.index.rows.get(shard, row, 2))
        sample = self._parsed(self._bytes(shard, begin, end), self.index.path(shard))
        if self._handlers:
            sample = self._decoded(sample, self.index.path(shard))
        return sample if self._transform is None else self._transform(sample)

    def _bytes(self, shard: int, begin: int, end: int) -> bytes:
        file = self.file(shard)
        if "://" not in self.index.path(shard):
            return os.pread(file.fileno(), end - begin, begin)
        file.seek(begin)
        data: bytes = file.read(end - begin)
        return data

    def _parsed(self, data: bytes, name: str) -> Any:
        try:
            with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as archive:
                files = [
                    {"fname": member.name, "data": opened.read(), "__url__": name}
                    for member in archive
                    if _counts(member) and (opened := archive.extractfile(member)) is not None
                ]
            return next(self._group(iter(files)))
        except (tarfile.TarError, StopIteration, ValueError) as error:
            raise TrainingError(
                f"a sample of the shard {name} cannot be read ({error}): if the file was changed, "
                f"write the index {self.index.prefix} again with drivetrain data index"
            ) from error

    def _decoded(self, sample: Any, name: str) -> Any:
        self._decode = self._decode or _decoder(self._handlers)
        try:
            return self._decode(sample)
        except _webdataset("autodecode").DecodingError as error:
            raise TrainingError(
                f"{error.k} of the sample {error.key} in the shard {name} cannot be decoded: "
                f"{error.__cause__}"
            ) from error

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "_decode": None}


def _decoder(handlers: Any) -> Any:
    """WebDataset's decoders, but for those that run what a file says."""
    codecs = _webdataset("autodecode")
    chosen = [] if handlers is True else list(handlers)
    made = [codecs.imagehandler(one) if isinstance(one, str) else one for one in chosen]
    return codecs.Decoder([*made, _refuse_pickles])


def _refuse_pickles(key: str, data: bytes) -> None:
    if key.rsplit(".", 1)[-1] in ("pkl", "pickle", "pyd", "pth"):
        raise ValueError(
            f"{key} holds a pickle, which may run any code; to trust it, give a handler of your "
            "own in decode"
        )


def _counts(member: tarfile.TarInfo) -> bool:
    """True if a member is a file of a sample; WebDataset leaves the others out alike."""
    name = member.name
    return member.isreg() and not (name.startswith("__") and name.split("/")[0].endswith("__"))


def scan_tar(name: str) -> tuple[npt.NDArray[np.int64], int]:
    """Where the samples of a tar file begin, and where the last one ends; and the file's bytes.

    Raises:
        ConfigError: it is compressed, cut off or no tar file.
    """
    split = _webdataset("tariterators").base_plus_ext
    with scanned(name) as (file, size):
        try:
            with tarfile.open(fileobj=file, mode="r:") as archive:
                places = list(_places(archive, split))
                file.seek(archive.offset)
                ended = file.read(_BLOCK) == bytes(_BLOCK)
        except tarfile.TarError as error:
            raise ConfigError(
                f"the shard {name} is no uncompressed tar file ({error}): samples are read by "
                "their place, so decompress it, or write it again"
            ) from error
    end = places[-1][1] if places else 0
    if end > size or not ended:
        raise ConfigError(f"the shard {name} is cut off: it has {size} bytes and no end mark")
    begins = [begin for begin, _ in places]
    return np.array([*begins, end] if places else [], np.int64), size


def _places(archive: tarfile.TarFile, split: Any) -> Iterator[tuple[int, int]]:
    """Beginning and end of each sample."""
    current, begin, end = None, 0, 0
    for member in archive:
        archive.members = []  # type: ignore[attr-defined]
        key = split(member.name)[0] if _counts(member) else None
        if key is None:
            continue
        if key != current and current is not None:
            yield begin, end
        if key != current:
            current, begin = key, member.offset
        end = member.offset_data + -(-member.size // _BLOCK) * _BLOCK
    if current is not None:
        yield begin, end
