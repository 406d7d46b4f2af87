"""Disks that fill up, fail or vanish end a job with one clear error, and cost it nothing saved."""

from __future__ import annotations

import errno
import threading
from pathlib import Path

import pytest
import torch
from drivetrain_kernels.rules import FusedAdam
from drivetrain_offload.file_io import FileIOError
from drivetrain_offload.file_io.faults import SHORT, Fault, Faults
from drivetrain_offload.files.swap_folder import SwapFolder
from nvme_harness import TILE, files_in, in_files, large_spec
from offload_harness import adopt, assert_same, on_device, opened, step, values

import drivetrain
from drivetrain.contracts import StateHome
from drivetrain.errors import ConfigError
from drivetrain.testing import RanksFailedError, run_distributed
from drivetrain.testing.data import vectors
from drivetrain.testing.models import mlp


def plan(direction: str, number: int, code: int) -> None:
    Faults.planned = [Fault(direction == "write", number, code)]


def a_step(home: StateHome, seed: int = 2) -> None:
    rule = home.spec.rule
    assert rule is not None
    step(home, values(home.spec, seed, torch.bfloat16), rule.defaults)


def a_whole_step(home: StateHome) -> None:
    a_step(home, 3)
    home.flush()


@pytest.mark.parametrize("direction", ["read", "write"])
@pytest.mark.parametrize("number", [1, 2, 4])
def test_an_error_in_the_middle_of_a_step_is_raised_then_or_at_the_next_flush_and_ever_after(
    tmp_path: Path, direction: str, number: int
) -> None:
    before = set(threading.enumerate())
    with opened() as job:
        (home,) = in_files(job, [large_spec(FusedAdam())], tmp_path)
        adopt(home)
        a_step(home)
        home.flush()
        home.pipeline.settle()
        plan(direction, number, errno.EIO)
        verb = "read from" if direction == "read" else "write to"
        with pytest.raises(FileIOError, match=rf"cannot {verb} .*b0\.states.*Input/output error"):
            a_whole_step(home)
        for call in (lambda: a_step(home, 4), home.flush, home.fragments()[0].read):
            with pytest.raises(FileIOError, match="EIO"):
                call()
    assert files_in(tmp_path) == []
    assert set(threading.enumerate()) <= before


def test_short_transfers_in_a_step_change_nothing(tmp_path: Path) -> None:
    spec = large_spec(FusedAdam())
    with opened() as job:
        (home,) = in_files(job, [spec], tmp_path)
        parameters = adopt(home)
        other, expected = on_device(spec)
        for number, direction in enumerate(("read", "write")):
            plan(direction, 2, SHORT)
            a_step(home, number)
            a_step(other, number)
        home.flush()
        assert_same(home, parameters, other, expected)


def test_a_disk_that_is_too_small_is_refused_with_the_arithmetic(tiny_disk: Path) -> None:
    spec = large_spec(FusedAdam(), padding=80_000)
    with opened() as job, pytest.raises(ConfigError) as info:
        in_files(job, [spec], tiny_disk)
    message = str(info.value)
    assert (
        "offload_optimizer.nvme_path: master, exp_avg, exp_avg_sq of 93,165 parameters" in message
    )
    assert "need 1,118,208 bytes" in message  # of each kind 91 pages
    assert f"{tiny_disk} has" in message


def test_a_disk_that_others_have_filled_since_is_refused(
    tiny_disk: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(SwapFolder, "free_bytes", lambda _: 1 << 40)
    spec = large_spec(FusedAdam(), padding=80_000)
    refused = pytest.raises(FileIOError, match=r"cannot reserve space for .*b0\.states.*ENOSPC")
    with opened() as job, refused:
        in_files(job, [spec], tiny_disk)
    assert files_in(tiny_disk) == []


def test_a_step_goes_on_when_the_folder_vanishes(tmp_path: Path) -> None:
    spec = large_spec(FusedAdam())
    with opened() as job:
        (home,) = in_files(job, [spec], tmp_path)
        parameters = adopt(home)
        other, expected = on_device(spec)
        (file,) = files_in(tmp_path)
        file.unlink()
        for each in (home, other):
            a_step(each)
        home.flush()
        assert_same(home, parameters, other, expected)


def config(folder: Path | str) -> dict[str, object]:
    offload = {"device": "nvme", "nvme_path": str(folder), "buffer_size": TILE}
    return {
        "train_batch_size": 8,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
        "zero_optimization": {"offload_optimizer": offload},
    }


def train(engine: drivetrain.Engine, steps: range) -> list[float]:
    inputs, targets = vectors(8 * 20)
    losses = []
    for number in steps:
        mine = slice(number * 8 + engine.job.rank * 4, number * 8 + engine.job.rank * 4 + 4)
        loss = engine(inputs[mine], targets[mine])
        engine.backward(loss)
        engine.step()
        losses.append(float(loss))
    return losses


def fails_on_one_rank(folder: str, saved: str) -> None:
    engine, *_ = drivetrain.initialize(model=mlp(), config=config(folder))
    train(engine, range(3))
    engine.save_checkpoint(saved)
    if engine.job.rank == 1:
        plan("write", 1, errno.EIO)
    train(engine, range(3, 6))


def goes_on(folder: str, saved: str | None) -> list[float]:
    engine, *_ = drivetrain.initialize(model=mlp(), config=config(folder))
    losses = train(engine, range(3)) if saved is None else []
    if saved is not None:
        assert engine.load_checkpoint(saved)[0] is not None
    losses += train(engine, range(3, 6))
    engine.destroy()
    return losses


def test_a_failing_disk_of_one_rank_ends_all_and_the_checkpoint_goes_on(tmp_path: Path) -> None:
    files, saved = tmp_path / "files", str(tmp_path / "saved")
    with pytest.raises(RanksFailedError) as info:
        run_distributed(fails_on_one_rank, 2, str(files), saved)
    errors = {rank: error.error for rank, error in info.value.errors.items()}
    assert "cannot write to" in errors[1]
    assert "EIO" in errors[1]
    assert "rank 1 failed: FileIOError: cannot write to" in errors[0]
    straight = run_distributed(goes_on, 2, str(files), None)
    resumed = run_distributed(goes_on, 2, str(files), saved)
    assert [losses[3:] for losses in straight] == resumed
    assert files_in(files) == []
