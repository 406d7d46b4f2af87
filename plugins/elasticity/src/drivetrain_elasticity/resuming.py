"""Going on with a job: from the copy in memory, or from a disk where that is newer or alone."""

from __future__ import annotations

import logging
import os
from contextlib import closing
from typing import TYPE_CHECKING, Any

from drivetrain.checkpoint.agreement import text_of
from drivetrain.checkpoint.format import index
from drivetrain.checkpoint.format.storage import Storage, open_storage
from drivetrain.errors import CheckpointError
from drivetrain_elasticity.client import KeeperError
from drivetrain_elasticity.hosts import join_hosts
from drivetrain_elasticity.section import SurvivalSection
from drivetrain_elasticity.spikes import watch_losses
from drivetrain_elasticity.survival import PLACE

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine

logger = logging.getLogger("drivetrain.survival")


def resume(
    engine: Engine, save_dir: str | os.PathLike[str] | None = None
) -> tuple[str | None, dict[str, Any] | None]:
    """Load the copy that the workers before have left in memory, if there is one. Collective.

    Args:
        engine: to load into; its number of ranks may be another one than theirs.
        save_dir: folder or URL of checkpoints, which is loaded where there is no copy, or where its
            latest checkpoint has seen more steps than the copy.

    Returns:
        Path and client state of what was loaded; ``(None, None)`` if there was nothing.

    Raises:
        CheckpointError: on every rank: what there is cannot be loaded, or a host's keeper does not
            start or cannot be reached by the others.
    """
    spike = engine.job.plan.section(SurvivalSection).spike
    if spike is not None:  # the very first loss may be one to go back from
        watch_losses(engine, spike)
    join_hosts(engine.job)
    found = ""
    if engine.job.rank == 0:
        copy, disk = _steps(PLACE), -1 if save_dir is None else _steps(save_dir)
        if max(copy, disk) >= 0:
            found = PLACE if copy >= disk else os.fspath(save_dir or "")
    place = text_of(engine.job, 0, found)
    return engine.load_checkpoint(place) if place else (None, None)


def _steps(place: str | os.PathLike[str]) -> int:
    """Steps that the latest checkpoint of ``place`` has seen; -1 if there is none."""
    try:
        with closing(open_storage(place)) as storage:
            if storage.size(index.LATEST) is None:
                return -1
            tag = storage.get(index.LATEST, 1 << 16).decode()
            path = f"{tag}/{index.MANIFEST}"
            manifest = index.unseal(storage.get(path, index.MANIFEST_LIMIT), storage.where(path))
            if place == PLACE:
                _check_whole(storage, tag, manifest)
            return int(manifest["step"])
    except (*index.MALFORMED, CheckpointError, KeeperError, OSError) as error:
        # Loading finds out more about one that is damaged; a copy that is none is not needed.
        logger.warning("%s cannot be looked at: %s", os.fspath(place), error)
        return -1 if place == PLACE else 0


def _check_whole(storage: Storage, tag: str, manifest: dict[str, Any]) -> None:
    """Refuse a copy of which parts have gone with hosts that are lost.

    Raises:
        CheckpointError: parts of it are missing.
    """
    ranks = range(manifest["world_size"])
    files = {rank: f"{tag}/{index.data_file(rank, manifest['id'])}" for rank in ranks}
    if lost := [str(rank) for rank, path in files.items() if storage.size(path) is None]:
        raise CheckpointError(
            f"the copy of step {manifest['step']} lacks what ranks {', '.join(lost)} had: more "
            "hosts were lost at once than one and its neighbour"
        )
