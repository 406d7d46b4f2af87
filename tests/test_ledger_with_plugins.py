"""Where the seconds of a run go when states are in files, and when stages wait for each other."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest
from drivetrain_offload.file_io import engines, python_engine
from drivetrain_profiler.ledger.reading import read_run
from drivetrain_profiler.ledger.summary import Summary, summary
from pipeline_models import TiedModel, data

import drivetrain
from drivetrain.errors import BuildError
from drivetrain.testing import run_distributed


def of(folder: Path) -> Summary:
    found = summary(read_run(folder))
    assert sum(found.columns.values()) == pytest.approx(found.wall, rel=0.01)
    return found


def offloaded(folder: Path, slow: float) -> None:
    """Three steps of states in files, on a disk that needs ``slow`` seconds for each write."""

    def no_library(_: Any) -> Any:
        raise BuildError("none here")

    call = python_engine._call

    def throttled(transfer: Any, *rest: Any) -> int:
        time.sleep(slow if transfer.writes else 0.0)
        return call(transfer, *rest)

    engines.NativeEngine, python_engine._call = no_library, throttled  # type: ignore[assignment, misc]
    home = {"device": "nvme", "nvme_path": str(folder / "states")}
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "optimizer": {"type": "AdamW", "params": {"lr": 0.01}},
        "zero_optimization": {"stage": 2, "offload_optimizer": home},
        "ledger": {"path": str(folder / "ledger"), "timeline_every": 1},
    }
    (folder / "states").mkdir(exist_ok=True)
    engine = drivetrain.initialize(model=TiedModel(), config=config)[0]
    for step in data(3, 1, 1):
        engine.train_batch(iter([step[0][0]]))
    engine.job.close()


def test_a_throttled_disk_is_a_stall_of_offload(tmp_path: Path) -> None:
    run_distributed(offloaded, 1, tmp_path, 0.8)
    slow = read_run(tmp_path / "ledger")[0].ranks[0].steps
    for step in slow[1:3]:  # one bucket is written in every step
        assert step.seconds["offload"] >= 0.76
        assert step.seconds["compute"] < step.seconds["offload"]
    of(tmp_path / "ledger")


def staged(folder: Path) -> None:
    config = {
        "train_micro_batch_size_per_gpu": 2,
        "gradient_accumulation_steps": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.01}},
        "pipeline": {"stages": 2},
        "ledger": {"path": str(folder)},
    }
    engine = drivetrain.initialize(model=TiedModel(), config=config)[0]
    if engine.job.mesh.coordinate("pp") == 1:
        blocks = [m for m in engine.module.modules() if type(m).__name__ == "Block"]
        blocks[-1].register_forward_pre_hook(lambda *_: time.sleep(0.1))
    for step in data(2, 4, 1):

        def slowly(rows: Any = step) -> Any:
            for micro in rows:
                time.sleep(0.05)
                yield micro[0]

        engine.train_batch(slowly())
    engine.job.close()


def test_stages_that_wait_for_a_slow_one_communicate_along_pp(tmp_path: Path) -> None:
    run_distributed(staged, 2, tmp_path)
    found = of(tmp_path)
    for rank in (0, 1):
        assert 0.38 <= found.ranks[rank]["data"] < 0.8
    waited = sum(s for c, s in found.ranks[0].items() if c.startswith("communication pp"))
    assert waited > 0.5
    assert found.stragglers[0].rank == 1
