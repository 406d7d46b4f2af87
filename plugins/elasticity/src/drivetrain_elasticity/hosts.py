"""Making the keepers of a job's hosts known to each other when its ranks have started."""

from __future__ import annotations

import json
import os
import platform
import secrets
from typing import TYPE_CHECKING, Any
from weakref import WeakSet

from drivetrain.checkpoint.agreement import text_of, texts_along, worst
from drivetrain.checkpoint.format import index
from drivetrain.communication.network import is_loopback, route_to
from drivetrain.errors import CheckpointError
from drivetrain_elasticity.keeper_storage import KeeperStorage
from drivetrain_elasticity.survival import PLACE, TAG

if TYPE_CHECKING:
    from drivetrain.job.job import Job

_HISTORY = 64
"""Saves before the latest one that hosts compare."""

_joined: WeakSet[Job] = WeakSet()


def join_hosts(job: Job) -> None:
    """Have the keepers of all hosts work together from now on. Collective; once for a job.

    A host that was away may have an older copy than the others, which is removed.

    Raises:
        CheckpointError: on every rank: a keeper does not start, or others cannot reach it.
    """
    if job in _joined:
        return
    _joined.add(job)
    storage, problem = None, None
    try:
        storage = KeeperStorage(PLACE)
    except OSError as error:
        problem = f"{error} on host {platform.node()}"
    _agree(job, problem)
    assert storage is not None
    ids = texts_along(job, "world", storage.keeper_id())
    if len(set(ids)) == 1:
        storage.join("", [])  # others, of which it may know, are no part of the job any more
    else:
        _join(job, storage, first_of_host=ids.index(ids[job.rank]) == job.rank)


def _join(job: Job, storage: KeeperStorage, *, first_of_host: bool) -> None:
    own: list[Any] = []
    problem = None
    try:
        host = _own_address()
        own = [storage.keeper_id(), host, storage.listen(host), _latest(storage)]
    except OSError as error:
        problem = f"the keeper of host {platform.node()} cannot be reached by others: {error}"
    _agree(job, problem)
    every = list(map(json.loads, texts_along(job, "world", json.dumps(own))))
    loopback = [is_loopback(host) for _, host, _, _ in every]
    if any(loopback) and not all(loopback):
        rank = loopback.index(True)
        raise CheckpointError(
            f"survival: rank {rank} is on another host than others, but the way to MASTER_ADDR "
            f"leads it to {every[rank][1]}, where others cannot reach it; start the job with an "
            "address of the first host that is its own on all of them"
        )
    token = text_of(job, 0, secrets.token_hex(32))
    if first_of_host:
        _forget_older(storage, own[3], [latest for *_, latest in every if latest])
    addresses = dict.fromkeys((id_, host, port) for id_, host, port, _ in every)
    try:
        storage.join(token, list(map(list, addresses)))
    except OSError as error:
        problem = f"host {platform.node()}: {error}"
    _agree(job, problem)


def _agree(job: Job, problem: str | None) -> None:
    if (found := worst(job, problem)) is not None:
        raise CheckpointError(f"survival: {found}")


def _own_address() -> str:
    """This host's address on the network that ranks meet on."""
    master = os.environ.get("MASTER_ADDR", "127.0.0.1")
    route = route_to(master)
    if route is None:
        raise OSError(f"no network interface leads to MASTER_ADDR, {master}")
    return route.own


def _latest(storage: KeeperStorage) -> dict[str, Any] | None:
    """What the manifest of this host's copy says of its place in the run."""
    path = f"{TAG}/{index.MANIFEST}"
    try:
        if index.MANIFEST not in storage.names_here(TAG):
            return None
        found = index.unseal(storage.get(path, index.MANIFEST_LIMIT), storage.where(path))
        history = [str(each) for each in found.get("history") or []][-_HISTORY:]
        return {"id": found["id"], "saved_at": found["saved_at"], "history": history}
    except (*index.MALFORMED, CheckpointError):  # one that is damaged is older than any other
        return None


def newest_of(known: list[dict[str, Any]]) -> str | None:
    """The id of the save that the others have gone before; ``None`` if there is none.

    Args:
        known: of each host that has a copy its ``id``, its ``history`` (ids of the saves before
            it) and ``saved_at``.
    """
    passed = {before for each in known for before in each["history"]}
    last = [each for each in known if each["id"] not in passed] or known
    return max(last, key=lambda each: str(each["saved_at"]))["id"] if last else None


def _forget_older(
    storage: KeeperStorage, own: dict[str, Any] | None, known: list[dict[str, Any]]
) -> None:
    """Remove what this host has of other saves than the newest one."""
    newest = newest_of(known)
    if newest is None:
        return
    if own is None or own["id"] != newest:
        storage.remove_here(f"{TAG}/{index.MANIFEST}")
    for name in storage.names_here(TAG):
        if index.id_of(name) not in (None, newest):
            storage.remove_here(f"{TAG}/{name}")
