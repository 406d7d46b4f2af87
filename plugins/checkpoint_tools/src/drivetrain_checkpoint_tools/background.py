"""One save at a time, written by a thread from a copy of the state in host memory."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from drivetrain.checkpoint.save import announce
from drivetrain.errors import CheckpointError
from drivetrain_checkpoint_tools.plugin import writers

if TYPE_CHECKING:
    from drivetrain.checkpoint import PendingSave
    from drivetrain.engine import Engine

logger = logging.getLogger("drivetrain.checkpoint")

_POLL_SECONDS = 0.05


class BackgroundWriter:
    """Writes the saves of one rank.

    The thread is no daemon, so the process does not end before a save has. Threads use no
    collectives: ranks vote through the storage, and rank 0's thread commits.

    Args:
        device: of the state; memory is page-locked for all but the host's.
        vote_timeout: seconds that rank 0 waits for the votes of the others.
    """

    def __init__(self, device: torch.device, vote_timeout: float) -> None:
        self._pinned = device.type not in ("cpu", "meta")
        self._timeout = vote_timeout
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None
        self._error: str | None = None

    def submit(self, pending: PendingSave) -> None:
        """Copy the state and return; wait first until the save before is complete.

        Raises:
            CheckpointError: the save before has failed.
        """
        self.wait()
        if self._memory.numel() < pending.nbytes:
            self._memory = torch.empty(0, dtype=torch.uint8)  # give back before taking more
            size = pending.nbytes
            self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
        pending.snapshot(self._memory)
        self._thread = threading.Thread(
            target=self._run, args=(pending,), name="checkpoint-write", daemon=False
        )
        self._thread.start()

    def wait(self) -> None:
        """Return when nothing is under way on this rank.

        Raises:
            CheckpointError: the latest save has failed and nobody was told yet.
        """
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.raise_error()

    def raise_error(self) -> None:
        """Raise what went wrong in the background since the last call, if anything did."""
        error, self._error = self._error, None
        if error is not None:
            raise CheckpointError(error)

    def _run(self, pending: PendingSave) -> None:
        try:
            self._write(pending)
            if pending.rank == 0:
                self._await_votes(pending)
                pending.commit()
                announce(pending)
        except Exception as error:  # noqa: BLE001 - there is nobody to raise it to yet
            self._error = f"checkpoint {pending.place} was not saved in the background: {error}"
            logger.error(self._error)
            if pending.rank == 0:
                # The storage that failed may fail again; others must have stopped writing.
                with suppress(OSError, CheckpointError):
                    self._await_votes(pending)
                    pending.discard()

    def _write(self, pending: PendingSave) -> None:
        try:
            pending.write()
        except Exception as error:
            with suppress(OSError):
                pending.refuse(str(error))
            raise

    def _await_votes(self, pending: PendingSave) -> None:
        deadline = time.monotonic() + self._timeout
        while missing := pending.missing_votes():
            if time.monotonic() > deadline:
                raise CheckpointError(
                    f"{missing} of {pending.world_size} ranks have not written their part within "
                    f"{self._timeout:g} s of rank 0"
                )
            time.sleep(_POLL_SECONDS)


def wait_for_saves(engine: Engine) -> None:
    """Return, on every rank, when the latest background save is a checkpoint. Collective.

    Needed before loading what the same process has saved.

    Raises:
        CheckpointError: on every rank, when it has failed on any.
    """
    from drivetrain.checkpoint.agreement import worst

    problem = None
    try:
        if engine in writers:
            writers[engine].wait()
    except CheckpointError as error:
        problem = str(error)
    problem = worst(engine, problem)
    if problem is not None:
        raise CheckpointError(problem)
