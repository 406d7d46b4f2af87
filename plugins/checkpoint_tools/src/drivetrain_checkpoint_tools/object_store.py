"""Checkpoints in object stores, through fsspec.

An object appears whole or not at all when it is closed, so nothing has to be renamed: a checkpoint
exists from the moment on that its manifest does, as on a disk.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from drivetrain.checkpoint.format.storage import Sink, Storage
from drivetrain.errors import CheckpointError

if TYPE_CHECKING:
    from typing_extensions import Buffer


class ObjectStore(Storage):
    """A prefix in an object store.

    Credentials and endpoints come from where the store's fsspec package takes them: environment
    variables and its configuration files.

    Args:
        root: URL such as ``s3://bucket/runs/7b``.

    Raises:
        CheckpointError: fsspec, or the package that serves the scheme, is not installed.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root)
        try:
            from fsspec.core import url_to_fs  # type: ignore[import-untyped, unused-ignore]

            self._store, self._prefix = url_to_fs(root)
        except ImportError as error:
            raise CheckpointError(
                f"{root} cannot be opened: {error}; "
                "pip install drivetrain-checkpoint-tools[fsspec] and the package for the scheme "
                "(s3fs, gcsfs, adlfs, ...)"
            ) from error

    def create(self, path: str) -> Sink:
        return _ObjectSink(self._store.open(self._path(path), "wb"))

    def put(self, path: str, data: bytes) -> None:
        self._store.pipe_file(self._path(path), data)

    def size(self, path: str) -> int | None:
        try:
            info = self._store.info(self._path(path))
        except FileNotFoundError:
            return None
        return int(info["size"]) if info["type"] == "file" else None

    def read(self, path: str, offset: int, into: Buffer) -> None:
        target = memoryview(into)
        try:
            data = self._store.cat_file(self._path(path), offset, offset + len(target))
        except FileNotFoundError:
            raise CheckpointError(f"checkpoint file {self.where(path)} is missing") from None
        if len(data) != len(target):
            raise CheckpointError(
                f"checkpoint file {self.where(path)} is damaged: it ends at byte "
                f"{offset + len(data):,}, but {offset + len(target):,} are needed"
            )
        target[:] = data

    def names(self, folder: str = "") -> list[str]:
        self._store.invalidate_cache()  # other ranks write, too
        try:
            found = self._store.ls(self._path(folder), detail=False)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(name.rstrip("/").rpartition("/")[2] for name in found)

    def remove(self, path: str) -> None:
        if self.size(path) is not None:
            self._store.rm_file(self._path(path))

    def _path(self, path: str) -> str:
        return f"{self._prefix.rstrip('/')}/{path}" if path else self._prefix


class _ObjectSink(Sink):
    def __init__(self, file: Any) -> None:
        self._file = file

    def write(self, data: Buffer) -> None:
        self._file.write(data)

    def close(self) -> None:
        self._file.close()

    def abandon(self) -> None:
        from fsspec.spec import AbstractBufferedFile  # type: ignore[import-untyped, unused-ignore]

        if isinstance(self._file, AbstractBufferedFile):
            self._file.discard()
            self._file.closed = True  # or it would be completed when it is collected
        else:
            self._file.close()
