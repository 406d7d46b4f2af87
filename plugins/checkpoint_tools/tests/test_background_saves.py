"""Saving while training goes on: what is written is what there was, and nothing is lost."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_checkpoint_tools import pulse, wait_for_saves
from drivetrain_checkpoint_tools.plugin import writers
from drivetrain_checkpoint_tools.verification import verify
from torch import nn

import drivetrain
from drivetrain.checkpoint.format.commit import PendingSave
from drivetrain.checkpoint.opening import opened
from drivetrain.communication.process_group import Ranks
from drivetrain.engine.engine import Engine
from drivetrain.errors import CheckpointError
from drivetrain.plan.registry import Registry
from drivetrain.testing import RanksFailedError, run_distributed
from drivetrain.testing.faulty_disk import GONE, check_all, failing, open_files, stored_contents
from drivetrain.testing.sharded import ShardedStates


def make(**changes: Any) -> Engine:
    torch.manual_seed(1)
    engine, *_ = drivetrain.initialize(
        model=nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 1)),
        config={
            "train_batch_size": 4,
            "optimizer": {"type": "AdamW", "params": {"lr": 0.1}},
            "checkpoint": {"background": {"enabled": True, "vote_timeout": 120}},
            **changes,
        },
        registry=Registry.installed().with_plugins(ShardedStates),
    )
    return engine


def train(engine: Engine, steps: int) -> None:
    for step in range(steps):
        generator = torch.Generator().manual_seed(step)
        engine.backward(engine(torch.randn(2, 5, generator=generator)).square().mean())
        engine.step()


def contents(engine: Engine) -> dict[str, list[float]]:
    return {
        f"{f.kind} {f.name} {f.boxes}": f.read().tolist()
        for f in engine.states.fragments()
        if f.kind != "gradient"
    }


class Gate:
    """Holds back the writing of all saves until it is opened."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.opened = threading.Event()
        self.entered = threading.Event()
        original = PendingSave.write

        def write(pending: PendingSave) -> None:
            self.entered.set()
            assert self.opened.wait(120)
            original(pending)

        monkeypatch.setattr(PendingSave, "write", write)


def test_training_goes_on_and_what_is_saved_is_what_there_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gate = Gate(monkeypatch)
    engine = make()
    train(engine, 2)
    expected = contents(engine)
    engine.save_checkpoint(tmp_path)
    assert gate.entered.wait(120)
    train(engine, 3)  # while nothing is written yet
    assert not (tmp_path / "latest").exists()
    gate.opened.set()
    wait_for_saves(engine)
    assert contents(engine) != expected
    path, _ = engine.load_checkpoint(tmp_path)
    assert path == str(tmp_path / "global_step2")
    assert contents(engine) == expected
    engine.destroy()


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = Gate(monkeypatch)
    engine = make()
    engine.save_checkpoint(tmp_path, "first")
    returned = threading.Event()
    early: list[bool] = []

    def open_later() -> None:
        early.append(returned.wait(0.3))
        gate.opened.set()

    opening = threading.Thread(target=open_later)
    opening.start()
    engine.save_checkpoint(tmp_path, "second")
    returned.set()
    opening.join()
    assert early == [False]
    assert (tmp_path / "first" / "manifest.json").exists()
    wait_for_saves(engine)
    assert (tmp_path / "latest").read_text() == "second"
    engine.destroy()


def full(pending: PendingSave) -> None:
    raise OSError(28, "No space left on device")


def test_an_error_comes_up_at_the_next_step_and_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    engine.save_checkpoint(tmp_path)
    wait_for_saves(engine)
    train(engine, 1)
    with monkeypatch.context() as patch:
        patch.setattr(PendingSave, "write", full)
        engine.save_checkpoint(tmp_path)
        for thread in threading.enumerate():
            if thread.name == "checkpoint-write":
                thread.join()
    with pytest.raises(CheckpointError, match=r"step1 was not saved in the background: .*28"):
        train(engine, 1)
    train(engine, 1)
    assert (tmp_path / "latest").read_text() == "global_step0"
    assert not (tmp_path / "global_step1").exists()
    engine.destroy()


def test_an_error_of_the_last_save_comes_up_when_the_engine_goes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = make()
    monkeypatch.setattr(PendingSave, "write", full)
    engine.save_checkpoint(tmp_path)
    with pytest.raises(CheckpointError, match="was not saved in the background"):
        engine.destroy()


def save_on_ranks(folder: str, failing: int | None) -> str:
    engine = make(plugins={"sharded_states": True})
    if Ranks.current().rank == failing:
        PendingSave.write, original = full, PendingSave.write  # type: ignore[method-assign]
    train(engine, 2)
    engine.save_checkpoint(folder)
    try:
        wait_for_saves(engine)
    except CheckpointError as error:
        return str(error)
    finally:
        if Ranks.current().rank == failing:
            PendingSave.write = original  # type: ignore[method-assign]
        engine.destroy()
    return "saved"


def test_ranks_save_together_in_the_background(tmp_path: Path) -> None:
    assert run_distributed(save_on_ranks, 2, str(tmp_path), None) == ["saved"] * 2
    with opened(str(tmp_path)) as stored:
        assert verify(stored) == []
        assert stored.world_size == 2


@pytest.mark.parametrize("failing", [0, 1])
def test_a_rank_that_cannot_write_makes_the_save_fail_on_all(tmp_path: Path, failing: int) -> None:
    for answer in run_distributed(save_on_ranks, 2, str(tmp_path), failing):
        assert "No space left on device" in answer
    assert not (tmp_path / "latest").exists()


SCRIPT = """
import sys, time
import torch
import drivetrain
from drivetrain.checkpoint.format.commit import PendingSave

original = PendingSave.write

def slow(pending):
    time.sleep(0.5)
    original(pending)

PendingSave.write = slow
engine, *_ = drivetrain.initialize(
    model=torch.nn.Linear(3, 1),
    config={
        "train_batch_size": 1,
        "optimizer": {"type": "SGD", "params": {"lr": 0.1}},
        "checkpoint": {"background": {}},
    },
)
engine.save_checkpoint(sys.argv[1])
"""


def test_the_process_does_not_end_before_the_save_has(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, str(tmp_path)],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    with opened(str(tmp_path)) as stored:
        assert verify(stored) == []


# -- disks that fail, ranks that die ---------------------------------------------------------------


@pytest.mark.parametrize("tag", ["global_step1", "global_step2"], ids=["same tag", "another tag"])
def test_whichever_operation_fails_in_the_background_all_checkpoints_load(
    tmp_path: Path, tag: str
) -> None:
    engine = make(
        checkpoint={"background": {}, "keep_last": 1},
    )
    saved = {}
    for step, place in ((1, tmp_path / "base"), (2, tmp_path / "reference")):
        train(engine, 1)
        engine.save_checkpoint(place)
        wait_for_saves(engine)
        saved[step] = stored_contents(place, f"global_step{step}")
    number, failed, ends = 0, True, set()
    while failed:
        number += 1
        folder = tmp_path / str(number)
        shutil.copytree(tmp_path / "base", folder)
        with failing(number) as disk:
            try:
                engine.save_checkpoint(folder, tag)
                wait_for_saves(engine)
                ends.add("saved")
            except CheckpointError as error:
                ends.add("not saved" if "was not saved" in str(error) else "saved, but")
            failed = disk.has_failed
        assert open_files(folder) == []
        steps = check_all(folder, saved)
        assert (folder / "latest").read_text() in steps
        shutil.rmtree(folder)
    assert ends == {"saved", "not saved", "saved, but"}
    engine.destroy()


def save_without_rank_1(root: str, kind: str) -> tuple[str, float]:
    """Save while rank 1 cannot write, or dies; what rank 0 is told, and after how long."""
    engine = make(plugins={"sharded_states": True}, checkpoint={"background": {}})
    victim = engine.job.rank == 1
    train(engine, 1)
    engine.save_checkpoint(root, "before")
    wait_for_saves(engine)
    if kind == "dies":
        pulse._DEAD_SECONDS = 3.0
        if victim:
            PendingSave.write = die  # type: ignore[assignment, method-assign]
    begin, told = time.monotonic(), ""
    with failing(1 if kind == "full" and victim else None, GONE):
        engine.save_checkpoint(root, "failed")
        try:
            writers[engine].wait()
        except CheckpointError as error:
            told = str(error)
    seconds = time.monotonic() - begin
    if kind == "dies":
        Path(root, "told").write_text(f"{seconds} {told}")
    train(engine, 1)  # goes on, or breaks
    engine.save_checkpoint(root, "after")
    wait_for_saves(engine)
    engine.destroy()
    return told, seconds


def die(pending: PendingSave) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def test_ranks_learn_of_a_full_disk_at_once_and_go_on(tmp_path: Path) -> None:
    ends = run_distributed(save_without_rank_1, 2, str(tmp_path), "full")
    assert "rank 1: [Errno 5]" in ends[0][0]
    assert "Errno 5" in ends[1][0]
    assert max(seconds for _, seconds in ends) < 10
    assert sorted(path.name for path in tmp_path.iterdir()) == ["after", "before", "latest"]
    with opened(str(tmp_path)) as stored:
        assert stored.tag == "after"
        assert verify(stored) == []


def test_a_rank_that_dies_in_a_save_is_missed_within_seconds(tmp_path: Path) -> None:
    with pytest.raises(RanksFailedError, match="SIGKILL"):
        run_distributed(save_without_rank_1, 2, str(tmp_path), "dies")
    seconds, _, told = (tmp_path / "told").read_text().partition(" ")
    assert float(seconds) < 15
    assert "rank 1: it has died or hangs" in told
    with opened(str(tmp_path)) as stored:
        assert stored.tag == "before"
        assert verify(stored) == []
