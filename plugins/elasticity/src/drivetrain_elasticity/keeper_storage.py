"""Checkpoints in the memory of a keeper: ``keeper://`` in place of a folder."""

from __future__ import annotations

import os
from contextlib import suppress
from typing import TYPE_CHECKING, Any

from drivetrain.checkpoint.format.storage import Sink, Storage
from drivetrain.errors import CheckpointError
from drivetrain_elasticity.client import Client
from drivetrain_elasticity.files import memory_file, write_all

if TYPE_CHECKING:
    from typing_extensions import Buffer

_VOTE = ".part.json"
"""How files end that only rank 0 reads, once."""


class KeeperStorage(Storage):
    """Files in memory that outlive the workers of this host, but not their agent.

    In a job on several hosts they outlive a host: what ranks write is also on the next one, and
    what says that there is a checkpoint is on all of them.

    Args:
        root: ``keeper://``, with or without a folder behind it.
    """

    def __init__(self, root: str) -> None:
        super().__init__(root)
        self._prefix = root.partition("://")[2].strip("/")
        self._client = Client()

    def create(self, path: str) -> Sink:
        return _MemorySink(self, path, everywhere=False)

    def put(self, path: str, data: bytes) -> None:
        sink = _MemorySink(self, path, everywhere=not path.endswith(_VOTE))
        try:
            sink.write(data)
            sink.close()
        except BaseException:
            sink.abandon()
            raise

    def keep(self, path: str, file: int, *, everywhere: bool) -> None:
        """Hand a file over to the keeper, in place of the one of that name."""
        self._client.ask("put", file, path=self._path(path), everywhere=everywhere)

    def size(self, path: str) -> int | None:
        found: int | None = self._client.ask("size", path=self._path(path))[0]
        return found

    def read(self, path: str, offset: int, into: Buffer) -> None:
        rest = memoryview(into).cast("B")
        # A descriptor for one use, since several threads read.
        found, file = self._client.ask("open", path=self._path(path))
        start, end = offset, offset + len(rest)
        if not found:  # of another host's keeper only what is needed
            there = self._path(path)
            found, file = self._client.ask("read", path=there, offset=offset, count=len(rest))
            start = 0
        if not found:
            raise CheckpointError(f"checkpoint file {self.where(path)} is missing")
        try:
            while rest:
                count = 0 if file is None else os.preadv(file, [rest], start)
                if not count:
                    raise CheckpointError(
                        f"checkpoint file {self.where(path)} is damaged: it ends at byte "
                        f"{end - len(rest):,}, but {end:,} are needed"
                    )
                rest, start = rest[count:], start + count
        finally:
            if file is not None:
                os.close(file)

    def names(self, folder: str = "") -> list[str]:
        found: list[str] = self._client.ask("names", path=self._path(folder), here=False)[0]
        return found

    def names_here(self, folder: str = "") -> list[str]:
        """What the keeper of this host has itself."""
        found: list[str] = self._client.ask("names", path=self._path(folder), here=True)[0]
        return found

    def remove(self, path: str) -> None:
        self._client.ask("remove", path=self._path(path), here=False)

    def remove_here(self, path: str) -> None:
        """Remove a file from the keeper of this host alone."""
        self._client.ask("remove", path=self._path(path), here=True)

    def keeper_id(self) -> str:
        """The keeper's own id, which differs between hosts."""
        return str(self._client.ask("id")[0])

    def listen(self, host: str) -> int:
        """Have the keeper accept those of other hosts at an address; answers its port."""
        return int(self._client.ask("listen", host=host)[0])

    def join(self, token: str, addresses: list[list[Any]]) -> None:
        """Have the keeper work with those of other hosts.

        Args:
            token: that all of them are told.
            addresses: id, address and port of each, this one among them, in the order of hosts.
        """
        self._client.ask("join", token=token, addresses=addresses)

    def _path(self, path: str) -> str:
        return "/".join(part for part in (self._prefix, path) if part)


class _MemorySink(Sink):
    def __init__(self, storage: KeeperStorage, path: str, *, everywhere: bool) -> None:
        self._storage, self._path, self._everywhere = storage, path, everywhere
        self._file = memory_file()

    def write(self, data: Buffer) -> None:
        write_all(self._file, data)

    def close(self) -> None:
        self._storage.keep(self._path, self._file, everywhere=self._everywhere)
        os.close(self._file)

    def abandon(self) -> None:
        with suppress(OSError):  # it is closed already where handing it over has succeeded
            os.close(self._file)
