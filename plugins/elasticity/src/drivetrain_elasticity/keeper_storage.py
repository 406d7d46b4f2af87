"""Checkpoints in the memory of a keeper: ``keeper://`` in place of a folder."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import TYPE_CHECKING

from drivetrain.checkpoint.format.storage import Sink, Storage
from drivetrain.errors import CheckpointError
from drivetrain_elasticity.keeper import Client

if TYPE_CHECKING:
    from typing_extensions import Buffer


class KeeperStorage(Storage):
    """Files in memory that outlive the workers of this host, but not their agent.

    Args:
        root: ``keeper://``, with or without a folder behind it.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._prefix = root.partition("://")[2].strip("/")
        self._client = Client()

    def create(self, path: str) -> Sink:
        return _MemorySink(self, path)

    def put(self, path: str, data: bytes) -> None:
        with self.writing(path) as sink:
            sink.write(data)

    def keep(self, path: str, file: int) -> None:
        """Hand a file over to the keeper, in place of the one of that name."""
        self._client.ask("put", self._path(path), file)

    def size(self, path: str) -> int | None:
        with self._opened(path) as file:
            return None if file is None else os.fstat(file).st_size

    def read(self, path: str, offset: int, into: Buffer) -> None:
        rest = memoryview(into).cast("B")
        end = offset + len(rest)
        with self._opened(path) as file:
            if file is None:
                raise CheckpointError(f"checkpoint file {self.where(path)} is missing")
            while rest:
                count = os.preadv(file, [rest], end - len(rest))
                if not count:
                    raise CheckpointError(
                        f"checkpoint file {self.where(path)} is damaged: it ends at byte "
                        f"{end - len(rest):,}, but {end:,} are needed"
                    )
                rest = rest[count:]

    def names(self, folder: str = "") -> list[str]:
        found: list[str] = self._client.ask("names", self._path(folder))[0]
        return found

    def remove(self, path: str) -> None:
        self._client.ask("remove", self._path(path))

    def _path(self, path: str) -> str:
        return "/".join(part for part in (self._prefix, path) if part)

    @contextmanager
    def _opened(self, path: str) -> Iterator[int | None]:
        """A descriptor of what the keeper has, for one use, since several threads read."""
        _, file = self._client.ask("get", self._path(path))
        try:
            yield file
        finally:
            if file is not None:
                os.close(file)


class _MemorySink(Sink):
    def __init__(self, storage: KeeperStorage, path: str) -> None:
        self._storage, self._path = storage, path
        self._file = os.memfd_create("drivetrain-checkpoint", os.MFD_CLOEXEC)

    def write(self, data: Buffer) -> None:
        rest = memoryview(data).cast("B")
        while rest:
            rest = rest[os.write(self._file, rest) :]

    def close(self) -> None:
        self._storage.keep(self._path, self._file)
        os.close(self._file)

    def abandon(self) -> None:
        with suppress(OSError):  # it is closed already where handing it over has succeeded
            os.close(self._file)
