"""One save at a time, written by a thread from a copy of the state in host memory."""

from __future__ import annotations

import logging
import threading
import time
from contextlib import suppress
from typing import TYPE_CHECKING

import torch

from drivetrain.checkpoint.format.commit import UnfinishedSaveError
from drivetrain.checkpoint.save import announce, take_back
from drivetrain.errors import CheckpointError
from drivetrain_checkpoint_tools.plugin import writers
from drivetrain_checkpoint_tools.pulse import Patient, Pulse

if TYPE_CHECKING:
    from drivetrain.checkpoint.format.commit import PendingSave
    from drivetrain.engine.engine import Engine
    from drivetrain.job.job import Job

logger = logging.getLogger("drivetrain.checkpoint")

_POLL_SECONDS = 0.05
_PULSE_SECONDS = 0.5
"""Between two looks at whether the ranks that have not voted are alive."""


class BackgroundWriter:
    """Writes the saves of one rank.

    The thread is no daemon, so the process does not end before a save has. Threads use no
    collectives: ranks vote through the storage, or refuse through the job's store, and rank 0's
    thread commits.

    Args:
        job: whose ranks save.
        vote_timeout: seconds that rank 0 waits for the votes of ranks that are alive.
    """

    def __init__(self, job: Job, vote_timeout: float) -> None:
        self._job = job
        self._board = job.failures
        self._pinned = job.device.type not in ("cpu", "meta")
        self._timeout = vote_timeout
        self._memory = torch.empty(0, dtype=torch.uint8)
        self._thread: threading.Thread | None = None
        self._error: str | None = None

    def submit(self, pending: PendingSave) -> None:
        """Copy the state and return. The save before has ended on all ranks."""
        self._join()
        # Copying may take long, and rank 0 may be the first to have written.
        pulse = Pulse(self._board, pending.id, pending.rank) if self._board is not None else None
        try:
            if self._memory.numel() < pending.nbytes:
                self._memory = torch.empty(0, dtype=torch.uint8)  # give back before taking more
                size = pending.nbytes
                self._memory = torch.empty(size, dtype=torch.uint8, pin_memory=self._pinned)
            pending.snapshot(self._memory)
            self._thread = threading.Thread(
                target=self._run, args=(pending, pulse), name="checkpoint-write", daemon=False
            )
            self._thread.start()
        except BaseException:
            self._thread = None
            if pulse is not None:
                pulse.end()
            raise

    def wait(self) -> None:
        """Return when nothing is under way on this rank.

        Raises:
            CheckpointError: the latest save has failed and nobody was told yet.
        """
        self._join()
        self.raise_error()

    def close(self) -> None:
        """Wait before the job goes; in a job that has failed, its own error is the one to raise."""
        self._join()
        if self._board is None or self._job.failures is not None:
            self.raise_error()

    def raise_error(self) -> None:
        """Raise what went wrong in the background since the last call, if anything did."""
        error, self._error = self._error, None
        if error is not None:
            raise CheckpointError(error)

    def _join(self) -> None:
        if self._thread is not None:
            self._thread.join()
            self._thread = None

    def _run(self, pending: PendingSave, pulse: Pulse | None) -> None:
        try:
            written = self._write(pending, pulse)
        finally:
            if pulse is not None:
                pulse.end()
        try:
            if pending.rank == 0:
                if self._await_votes(pending) and written:
                    pending.commit()
                    announce(pending)
                else:
                    take_back(pending)
        except Exception as error:  # noqa: BLE001 - there is nobody to raise it to yet
            self._report(pending, error)
            take_back(pending)
        finally:
            pending.storage.close()

    def _write(self, pending: PendingSave, pulse: Pulse | None) -> bool:
        """Write this rank's part, or tell the others that it will not come."""
        try:
            pending.write()
        except Exception as error:  # noqa: BLE001 - there is nobody to raise it to yet
            self._report(pending, error)
            if pulse is not None:
                pulse.refuse(str(error))
            with suppress(OSError, CheckpointError):  # the storage that failed may fail again
                pending.refuse(str(error))
            return False
        return True

    def _report(self, pending: PendingSave, error: Exception) -> None:
        failed = f"checkpoint {pending.place} was not saved in the background: {error}"
        self._error = str(error) if isinstance(error, UnfinishedSaveError) else failed
        logger.error(self._error)

    def _await_votes(self, pending: PendingSave) -> bool:
        """On rank 0, wait until all ranks have written, or have ended without; true if none did.

        What goes wrong is reported at once. Until all have ended, files must not be removed.
        """
        deadline, next_look = time.monotonic() + self._timeout, 0.0
        ended = {pending.rank}
        patient = Patient(self._board, pending.id) if self._board is not None else None
        while missing := pending.missing_votes() - ended:
            now = time.monotonic()
            if now > deadline:
                problem = f"it has not written its part within {self._timeout:g} s of rank 0"
                self._end(pending, ended, dict.fromkeys(missing, problem))
            elif patient is not None and now > next_look:
                next_look = now + _PULSE_SECONDS
                found = {rank: patient.problem(rank) for rank in missing}
                self._end(pending, ended, {r: text for r, text in found.items() if text})
            time.sleep(_POLL_SECONDS)
        return ended == {pending.rank}

    def _end(self, pending: PendingSave, ended: set[int], problems: dict[int, str]) -> None:
        if problems and ended == {pending.rank}:
            rank, problem = next(iter(problems.items()))
            self._report(pending, CheckpointError(f"rank {rank}: {problem}"))
        ended.update(problems)


def wait_for_saves(engine: Engine) -> None:
    """Return, on every rank, when the latest background save has ended. Collective.

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
    problem = worst(engine.job, problem)
    if problem is not None:
        raise CheckpointError(problem)
