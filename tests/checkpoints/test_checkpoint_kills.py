"""Real ranks, killed by SIGKILL in the middle of a save."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
from drivetrain_checkpoint_tools import verify
from layouts import Layout, hashes, make, train

from drivetrain.checkpoint.format import storage
from drivetrain.checkpoint.opening import opened
from drivetrain.communication.process_group import Ranks
from drivetrain.testing import RanksFailedError, run_distributed

LAYOUT = Layout(2, 2)
FOLDER_OPERATIONS = 4
"""Making a folder and syncing the one it is in: whichever rank is first does that."""

OPERATIONS = ("open", "write", "fsync", "close", "replace", "mkdir", "unlink", "rmdir")


class DeadlyOs:
    """``os`` whose operations are counted; the process dies before number ``last``."""

    def __init__(self, last: int | None) -> None:
        self.count = 0
        self.made_folders = 0
        self._last = last

    def __getattr__(self, name: str) -> Any:
        if name in OPERATIONS:
            self.count += 1
            self.made_folders += name == "mkdir"
            if self.count == self._last:
                os.kill(os.getpid(), signal.SIGKILL)
        return getattr(os, name)


def save_twice(folder: str, victim: int, last: int | None) -> int:
    """Save two checkpoints; how many operations the second takes on this rank in any case."""
    engine = make(LAYOUT)
    train(engine, 2)
    engine.save_checkpoint(folder)
    train(engine, 1)
    deadly = DeadlyOs(last if Ranks.current().rank == victim else None)
    with patch.object(storage, "os", deadly):
        engine.save_checkpoint(folder)
    engine.destroy()
    return deadly.count - FOLDER_OPERATIONS * deadly.made_folders


def resume(folder: str) -> list[float]:
    engine = make(LAYOUT)
    path, _ = engine.load_checkpoint(folder)
    assert path is not None
    losses = train(engine, 5 - engine.global_steps)
    engine.save_checkpoint(folder, "five")
    engine.destroy()
    return losses


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[int]]:
    """A folder in which nobody was killed, resumed to step 5; operations by rank."""
    folder = tmp_path_factory.mktemp("whole")
    counts = run_distributed(save_twice, 2, str(folder), 0, None)
    run_distributed(resume, 2, str(folder))
    return folder, counts


@pytest.mark.parametrize("at", [0.0, 0.3, 0.6, 0.9])
@pytest.mark.parametrize("victim", [0, 1])
def test_whichever_rank_is_killed_in_a_save_the_run_goes_on_to_the_same_end(
    whole: tuple[Path, list[int]], tmp_path: Path, victim: int, at: float
) -> None:
    reference, counts = whole
    last = 1 + round(at * (counts[victim] - 1))
    with pytest.raises(RanksFailedError, match="SIGKILL"):
        run_distributed(save_twice, 2, str(tmp_path), victim, last)
    with opened(str(tmp_path)) as stored:
        assert verify(stored) == []
        assert stored.manifest["step"] in (2, 3)
    run_distributed(resume, 2, str(tmp_path))
    assert hashes(tmp_path, "five") == hashes(reference, "five")
