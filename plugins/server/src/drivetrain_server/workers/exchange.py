"""Adapters come and go: the shelf and all workers are kept the same.

Changes happen one after another. A worker that is being started misses them; before it serves, it
is told what it has missed. So all workers that serve have what the shelf has.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Mapping, Sequence

from drivetrain.errors import ConfigError
from drivetrain_server.workers.replica import Replica
from drivetrain_server.workers.shelf import Shelf
from drivetrain_server.workers.tickets import RefusedError, WorkerLostError
from drivetrain_server.workers.wire import Message

logger = logging.getLogger("drivetrain.server")


class Exchange:
    """Changes which adapters there are, on the shelf and on every worker.

    Args:
        shelf: what clients can choose, and what workers load when they start.

    Attributes:
        replicas: the workers.
    """

    def __init__(self, shelf: Shelf) -> None:
        self._shelf, self._changing = shelf, asyncio.Lock()
        self.replicas: Sequence[Replica] = ()

    async def load(self, name: str) -> None:
        """Have all workers load an adapter of the folder, or load it again.

        If one of them refuses it, it is taken from all and from the shelf, whatever its name stood
        for before: what would be loaded at the next start is what is in the folder.

        Raises:
            ConfigError: the folder has no such adapter.
            RefusedError: a worker cannot load it.
            WorkerLostError: no worker serves; nothing has changed.
        """
        async with self._changing:
            path = self._shelf.path(name)
            known = name in self._shelf.paths
            try:
                loaded = await self._tell(name, path)
            except RefusedError as error:
                await self._drop(name)
                if not known:
                    raise
                message = f"{error}; {name!r} is forgotten, as its folder no longer has one"
                raise RefusedError(message, error.status, error.code) from error
            if not loaded:
                raise WorkerLostError("no worker serves at present, they are started again")
            self._shelf.paths[name] = path

    async def forget(self, name: str) -> None:
        """Take an adapter from the shelf and from all workers; requests that run with it go on.

        Raises:
            ConfigError: there is none of that name.
        """
        async with self._changing:
            if name not in self._shelf.paths:
                raise ConfigError(f"there is no adapter {name[:200]!r}")
            await self._drop(name)

    async def settle(self, replica: Replica, failed: Mapping[str, str], life: object) -> None:
        """Tell a worker that has loaded what it has missed; then let it serve.

        Args:
            replica: its worker; serves when this returns.
            failed: adapters that it could not load, and why; they are taken from all.
            life: stands for its process; another one may have followed.

        Raises:
            WorkerLostError: the worker has died.
        """
        async with self._changing:
            for name, why in failed.items():
                if name not in replica.missed and name in self._shelf.paths:
                    logger.error("adapter %s is no longer served: %s", name, why)
                    await self._drop(name)
            while replica.missed:
                name = replica.missed.pop()
                path = self._shelf.paths.get(name, "")
                try:
                    await _told(replica, name, path)
                except RefusedError as error:
                    if path:  # one that it never had need not be forgotten
                        logger.error("adapter %s is no longer served: %s", name, error)
                        await self._drop(name)
                        replica.missed.discard(name)
            replica.open(life)

    async def _drop(self, name: str) -> None:
        self._shelf.paths.pop(name, None)
        try:
            await self._tell(name, "")
        except RefusedError as error:  # a worker that has refused it has it not
            logger.debug("adapter %s: %s", name, error)

    async def _tell(self, name: str, path: str) -> int:
        """Tell all workers that serve; how many have done it. Others are told when they start.

        Raises:
            RefusedError: of the first one that refuses, once all have replied.
        """
        told = [replica for replica in self.replicas if replica.ready]
        for replica in self.replicas:
            if replica not in told:
                replica.missed.add(name)
        found = await asyncio.gather(
            *(_told(replica, name, path) for replica in told), return_exceptions=True
        )
        for replica, result in zip(told, found, strict=True):
            if isinstance(result, WorkerLostError):
                replica.missed.add(name)
        for result in found:
            if isinstance(result, BaseException) and not isinstance(result, WorkerLostError):
                raise result
        return sum(result is None for result in found)


async def _told(replica: Replica, name: str, path: str) -> None:
    order: Message = {"do": "adapter", "name": name, "path": path}
    ticket = replica.tell(order)
    try:
        await ticket.begun()
    finally:
        ticket.close()
