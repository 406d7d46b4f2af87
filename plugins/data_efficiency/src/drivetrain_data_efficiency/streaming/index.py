"""An index of shards: which files there are, how long, and where samples lie in them.

``<prefix>.json`` names the files and their bytes. ``<prefix>.bin`` and ``.idx`` are an indexed data
set with an item for each file: for a tar file the byte at which each sample begins, and that at
which the last one ends; for a Parquet file the rows of each of its row groups.
"""

from __future__ import annotations

import json
import multiprocessing
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np

from drivetrain.errors import ConfigError
from drivetrain_data_efficiency.analysis.indexed import IndexedDataset, write_rows

KINDS = {".tar": "tar", ".parquet": "parquet"}


@dataclass(frozen=True)
class ShardIndex:
    """The files of a data set, and where samples lie in them.

    Args:
        prefix: path of the index without ``.json``.
        kind: ``tar`` or ``parquet``.
        files: name of each in the index, and its bytes.
        root: folder or URL that names are relative to.
        rows: an item for each file; read when it is asked for.
    """

    prefix: str
    kind: str
    files: Sequence[tuple[str, int]]
    root: str
    rows: IndexedDataset

    @classmethod
    def read(cls, prefix: str | os.PathLike[str], kind: str, root: Any = None) -> ShardIndex:
        """Read an index.

        Args:
            prefix: path without ``.json``.
            kind: which one it has to be.
            root: folder or URL that file names are relative to; the index's folder if ``None``.

        Raises:
            ConfigError: there is none, it is damaged, or of another kind.
        """
        path = Path(f"{os.fspath(prefix)}.json")
        if not path.is_file():
            raise ConfigError(
                f"there is no index of shards {path}: write it once with `drivetrain data index "
                f"{os.fspath(prefix)} SHARDS...`"
            )
        try:
            found = json.loads(path.read_text("utf-8"))
            files = [(str(name), int(size)) for name, size in found["files"]]
            own = str(found["kind"])
        except (ValueError, KeyError, TypeError) as error:
            raise ConfigError(f"{path} is no index of shards: {error}") from error
        if own != kind:
            raise ConfigError(f"{path} is an index of {own} files, not of {kind} files")
        rows = IndexedDataset(prefix)
        if len(rows) != len(files):
            raise ConfigError(
                f"{path} names {len(files)} files, and {prefix}.idx has {len(rows)}: write both "
                "again with drivetrain data index"
            )
        base = os.fspath(root) if root is not None else str(path.parent)
        return cls(os.fspath(prefix), kind, files, base, rows)

    def path(self, number: int) -> str:
        """Path or URL of a file."""
        name, base = self.files[number][0], self.root
        if "://" in name or Path(name).is_absolute():
            return name
        return f"{base.rstrip('/')}/{name}" if "://" in base else str(Path(base) / name)


def index_shards(
    prefix: str | os.PathLike[str], files: Sequence[str | os.PathLike[str]], workers: int = 0
) -> ShardIndex:
    """Write the index of shards: of tar files only headers are read, of Parquet files only footers.

    Names are kept relative to the index where files lie beside or below it, so that all of it can
    be moved together.

    Args:
        prefix: path of the index, without ``.json``.
        files: all ``.tar``, or all ``.parquet``; paths or URLs that ``fsspec`` opens.
        workers: processes; 0 reads in this one.

    Raises:
        ConfigError: no files, two of a name, several kinds, or one that cannot be read.
    """
    names = [os.fspath(file) for file in files]
    if not names:
        raise ConfigError("an index of shards needs at least one file")
    if len(set(names)) < len(names):
        twice = next(name for name in names if names.count(name) > 1)
        raise ConfigError(f"the shard {twice} is named twice, so its samples would come twice")
    kinds = {
        KINDS.get(Path(name).suffix, f"{Path(name).name}: no .tar or .parquet") for name in names
    }
    if len(kinds) > 1 or not kinds <= set(KINDS.values()):
        raise ConfigError(
            f"shards are all .tar or all .parquet files; got {', '.join(sorted(kinds))}"
        )
    kind = kinds.pop()
    scan = _scanner(kind)
    if workers:
        with multiprocessing.get_context("spawn").Pool(min(workers, len(names))) as pool:
            found = pool.map(scan, names, chunksize=max(1, min(32, len(names) // (4 * workers))))
    else:
        found = [scan(name) for name in names]
    Path(prefix).parent.mkdir(parents=True, exist_ok=True)
    rows = [row for row, _ in found]
    write_rows(prefix, np.concatenate(rows), [len(row) for row in rows], np.int64)
    folder = Path(prefix).resolve().parent
    listed = [(_relative(name, folder), size) for name, (_, size) in zip(names, found, strict=True)]
    part = Path(f"{os.fspath(prefix)}.json.part")
    part.write_text(json.dumps({"kind": kind, "files": listed}), "utf-8")
    part.replace(f"{os.fspath(prefix)}.json")
    return ShardIndex.read(prefix, kind)


def _scanner(kind: str) -> Any:
    if kind == "tar":
        from drivetrain_data_efficiency.streaming.tar import scan_tar

        return scan_tar
    from drivetrain_data_efficiency.streaming.parquet import scan_parquet

    return scan_parquet


def _relative(name: str, folder: Path) -> str:
    if "://" in name:
        return name
    path = Path(name).resolve()
    return str(path.relative_to(folder)) if path.is_relative_to(folder) else str(path)


def open_shard(name: str) -> Any:
    """A shard as a binary file that can be read anywhere.

    Raises:
        ConfigError: it cannot be opened.
    """
    try:
        if "://" not in name:
            return Path(name).open("rb")
        fsspec: Any = import_module("fsspec")
        return fsspec.open(name, "rb").open()
    except (OSError, ImportError, ValueError) as error:
        raise ConfigError(f"the shard {name} cannot be opened: {error}") from error


def bytes_of(file: Any) -> int:
    """Bytes of an open shard."""
    file.seek(0, os.SEEK_END)
    size = int(file.tell())
    file.seek(0)
    return size


@contextmanager
def scanned(name: str) -> Iterator[tuple[Any, int]]:
    """An open shard and its bytes; closes it, and names it in what goes wrong."""
    with open_shard(name) as file:
        yield file, bytes_of(file)
