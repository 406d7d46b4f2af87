"""Copies in memory: what the keeper holds, going on with fewer ranks, and going back."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_elasticity import resume
from drivetrain_elasticity.keeper import OWNER
from drivetrain_elasticity.keeper_storage import KeeperStorage
from drivetrain_elasticity.survival import Survival

import drivetrain
from drivetrain.errors import CheckpointError, ConfigError, TrainingError
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry
from drivetrain.testing import PluginConformance, data, run_distributed
from drivetrain.testing.models import mlp

REGISTRY = Registry.installed().with_plugins(Survival)


class TestSurvival(PluginConformance):
    plugin = Survival
    config = {"survival": {"every": 5}}


@pytest.fixture
def owner() -> Iterator[str]:
    """A process that a keeper belongs to, which ends with it."""
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    yield str(process.pid)
    process.communicate(b"\n")


@pytest.fixture
def storage(owner: str, monkeypatch: pytest.MonkeyPatch) -> KeeperStorage:
    monkeypatch.setenv(OWNER, owner)
    return KeeperStorage("keeper://place")


def test_a_keeper_holds_files(storage: KeeperStorage) -> None:
    storage.put("tag/manifest", b"old")
    storage.put("tag/manifest", b"newer")
    with storage.writing("tag/data") as sink:
        sink.write(b"0123")
        sink.write(torch.arange(3, dtype=torch.uint8).numpy())
    assert storage.names() == ["tag"]
    assert storage.names("tag") == ["data", "manifest"]
    assert storage.names("ta") == []
    assert storage.get("tag/manifest", 100) == b"newer"
    found = bytearray(4)
    storage.read("tag/data", 2, found)
    assert found == b"23\x00\x01"
    assert (storage.size("tag/data"), storage.size("tag"), storage.size("no")) == (7, None, None)
    storage.remove("tag/data")
    storage.remove("tag/data")
    storage.remove("tag")
    assert storage.names("tag") == ["manifest"]
    assert KeeperStorage("keeper://elsewhere").names() == []


def test_what_is_missing_or_short_is_named(storage: KeeperStorage) -> None:
    storage.put("file", b"abc")
    with pytest.raises(CheckpointError, match="keeper://place/file is damaged: it ends at byte 3"):
        storage.read("file", 1, bytearray(3))
    with pytest.raises(CheckpointError, match="keeper://place/other is missing"):
        storage.read("other", 0, bytearray(1))


def test_nothing_is_left_when_the_owner_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    monkeypatch.setenv(OWNER, str(process.pid))
    storage = KeeperStorage("keeper://place")
    storage.put("file", b"abc")
    process.communicate(b"\n")
    # The keeper closes its connections when it ends, and a read of one returns nothing then.
    assert storage._client._socket.recv(1) == b""
    with pytest.raises(OSError, match="keeper of memory checkpoints"):
        storage.names()


def engine_of(spike: dict[str, Any] | None = None) -> drivetrain.Engine:
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "survival": {"every": 2, "spike": spike},
    }
    samples = list(zip(*data.vectors(32), strict=True))
    return drivetrain.initialize(
        model=mlp(), config=config, training_data=samples, registry=REGISTRY
    )[0]


def trained(steps: int, leaves: bool) -> tuple[str | None, list[float], list[torch.Tensor]]:
    """Where a job went on from, its losses, and its weights at the end."""
    engine = engine_of()
    place, _ = resume(engine)
    losses = [float(engine.train_batch()) for _ in range(steps - engine.global_steps)]
    weights = [p.detach().clone() for p in engine.module.parameters()]
    if not leaves:
        engine.destroy()
    engine.job.close()
    return place, losses, weights


def test_a_job_goes_on_with_fewer_ranks_and_the_same_data(owner: str) -> None:
    env = {OWNER: owner}
    first = run_distributed(trained, 2, 5, False, env=env)[0]  # the copy is that of step 4
    second = run_distributed(trained, 1, 8, False, env=env)[0]
    assert (first[0], second[0]) == (None, "keeper://survival/copy")
    unbroken = run_distributed(trained, 2, 8, False, env={OWNER: str(os.getpid())})[0]
    assert first[1] == unbroken[1][:5]
    assert second[1] == pytest.approx(unbroken[1][4:], rel=1e-5)
    for one, other in zip(second[2], unbroken[2], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-5, atol=1e-6)


def newer_on_disk(folder: str) -> str | None:
    engine = engine_of()
    for _ in range(3):
        engine.train_batch()
    engine.save_checkpoint(folder)
    place, _ = resume(engine, folder)
    engine.destroy()
    engine.job.close()
    return place


def test_a_newer_checkpoint_on_disk_is_taken(owner: str, tmp_path: Path) -> None:
    places = run_distributed(newer_on_disk, 2, str(tmp_path), env={OWNER: owner})
    assert places == [str(tmp_path / "global_step3")] * 2


def spiked(bad: tuple[int, ...], at_most: int) -> tuple[list[int], list[int]]:
    """Steps, and samples that the loader had handed out, after each batch."""
    engine = engine_of({"factor": 5.0, "window": 4, "at_most": at_most})
    steps, consumed = [], []
    for number in range(9):
        with torch.no_grad():
            if number in bad:  # what a bad batch has done to the weights
                next(engine.module.parameters()).mul_(100.0)
        engine.train_batch()
        steps.append(engine.global_steps)
        assert engine.training_dataloader is not None
        consumed.append(engine.training_dataloader.state_dict()["consumed"])
    engine.destroy()
    engine.job.close()
    return steps, consumed


def test_after_a_spike_the_job_goes_back_and_leaves_data_out(owner: str) -> None:
    found = run_distributed(spiked, 2, (5,), 3, env={OWNER: owner})
    steps, consumed = found[0]
    assert found[1] == found[0]
    assert steps == [1, 2, 3, 4, 5, 4, 5, 6, 7]
    assert consumed[:7] == [4, 8, 12, 16, 20, 24, 28]


def test_many_spikes_in_a_row_are_an_error(owner: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(OWNER, owner)
    with pytest.raises(TrainingError, match="for the 2th time in a row"):
        spiked((5, 6), 1)


def test_background_saves_are_refused_beside_it() -> None:
    config = {"survival": {}, "checkpoint": {"background": {}}, "train_batch_size": 1}
    if Registry.installed().find("plugins", "checkpoint.background") is None:
        pytest.skip("drivetrain-checkpoint-tools is not installed")
    with pytest.raises(ConfigError, match=r"cannot be combined with checkpoint\.background"):
        Plan.build(config, registry=REGISTRY)


def poisoned() -> tuple[list[int], list[int], bool]:
    """Steps and samples handed out after each batch, where one sample makes one rank's loss NaN."""
    samples = list(zip(*data.vectors(32), strict=True))
    samples[7] = (samples[7][0] * float("nan"), samples[21][1])
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "survival": {"every": 2, "spike": {"factor": 5.0, "window": 4}},
    }
    engine = drivetrain.initialize(
        model=mlp(), config=config, training_data=samples, registry=REGISTRY
    )[0]
    steps, consumed = [], []
    for _ in range(8):  # an epoch
        engine.train_batch()
        steps.append(engine.global_steps)
        assert engine.training_dataloader is not None
        consumed.append(engine.training_dataloader.state_dict()["consumed"])
    weights = engine.module_state_dict()
    finite = all(bool(torch.isfinite(weight).all()) for weight in weights.values())
    engine.destroy()
    engine.job.close()
    return steps, consumed, finite


def test_a_loss_that_is_no_number_on_one_rank_makes_all_go_back(owner: str) -> None:
    found = run_distributed(poisoned, 2, env={OWNER: owner})
    assert found[0] == found[1]
    steps, consumed, finite = found[0]
    at = next(n for n in range(1, 8) if steps[n] <= steps[n - 1])  # the batch of that sample
    back = at // 2 * 2  # there are copies of even steps
    assert steps == [*range(1, at + 1), *range(back, back + 8 - at)]
    assert consumed[:7] == [4 * n for n in range(1, 8)]
    assert finite
