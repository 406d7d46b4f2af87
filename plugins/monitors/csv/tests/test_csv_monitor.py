"""CSV files hold the numbers of training, once, at the samples they belong to."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_csv import CsvMonitor

import drivetrain
from drivetrain.plan.plan import Plan
from drivetrain.plan.registry import Registry
from drivetrain.testing import (
    PluginConformance,
    RanksFailedError,
    data,
    reference_losses,
    run_distributed,
)
from drivetrain.testing.models import mlp

LOSS = "Train_Samples_train_loss.csv"
RATE = "Train_Samples_lr.csv"


class TestCsvMonitor(PluginConformance):
    plugin = CsvMonitor
    config = {"csv_monitor": {"enabled": True, "output_path": "logs"}}


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs, targets = data.vectors(4 * steps)
    return [(inputs[i : i + 4], targets[i : i + 4]) for i in range(0, 4 * steps, 4)]


def train(section: dict[str, Any], steps: int, keys: dict[str, Any]) -> list[str]:
    """The files there are before the engine is destroyed."""
    config = {
        "train_batch_size": 4,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "scheduler": {"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}},
        "csv_monitor": section,
        **keys,
    }
    engine, *_ = drivetrain.initialize(
        model=mlp(), config=config, registry=Registry.installed().with_plugins(CsvMonitor)
    )
    rank, share = engine.job.rank, engine.train_micro_batch_size_per_gpu()
    dtype = next(engine.parameters()).dtype
    for inputs, targets in batches(steps):
        rows = slice(rank * share, (rank + 1) * share)
        engine.backward(engine(inputs[rows].to(dtype), targets[rows]))
        engine.step()
    names = sorted(path.name for path in Path(section["output_path"]).rglob("*.csv"))
    engine.destroy()
    return names


def rows(path: Path) -> list[list[str]]:
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


@pytest.mark.parametrize("world", [1, 2])
def test_files_hold_the_references_losses_and_rates_at_global_samples(
    world: int, tmp_path: Path
) -> None:
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}
    run_distributed(train, world, section, 3, {})
    expected = reference_losses(
        mlp(),
        [[batch] for batch in batches(3)],
        lambda p: torch.optim.SGD(p, lr=0.5),
        learning_rate=lambda step: 0.5 * 0.5**step,
    )
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == [RATE, LOSS]
    header, *lines = rows(tmp_path / "run" / RATE)
    assert header == ["step", "lr"]
    assert lines == [["4", "0.5"], ["8", "0.25"], ["12", "0.125"]]
    header, *lines = rows(tmp_path / "run" / LOSS)
    assert header == ["step", "train_loss"]
    assert [int(samples) for samples, _ in lines] == [4, 8, 12]
    assert [float(loss) for _, loss in lines] == pytest.approx(expected, rel=1e-6)


def test_nothing_is_read_from_the_device_before_the_end_of_a_short_run(tmp_path: Path) -> None:
    section = {"enabled": True, "output_path": str(tmp_path)}
    assert run_distributed(train, 1, section, 3, {}) == [[]]
    assert len(rows(tmp_path / "DeepSpeedJobName" / LOSS)) == 4


def test_a_long_run_is_written_while_it_goes_on(tmp_path: Path) -> None:
    section = {"enabled": True, "output_path": str(tmp_path)}
    assert run_distributed(train, 1, section, 101, {}) == [[RATE, LOSS]]
    assert len(rows(tmp_path / "DeepSpeedJobName" / LOSS)) == 102


def test_a_second_run_continues_the_files(tmp_path: Path) -> None:
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}
    for _ in range(2):
        run_distributed(train, 1, section, 1, {})
    assert rows(tmp_path / "run" / RATE) == [["step", "lr"], ["4", "0.5"], ["4", "0.5"]]


def test_loss_scale_and_times_are_written_where_there_are_any(tmp_path: Path) -> None:
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}
    keys = {"fp16": {"enabled": True, "loss_scale": 128}, "wall_clock_breakdown": True}
    run_distributed(train, 1, section, 2, keys)
    assert rows(tmp_path / "run" / "Train_Samples_loss_scale.csv") == [
        ["step", "loss_scale"],
        ["4", "128.0"],
        ["8", "128.0"],
    ]
    for part in ("forward", "backward", "step"):
        header, *lines = rows(tmp_path / "run" / f"Train_Samples_elapsed_time_ms_{part}.csv")
        assert header == ["step", f"elapsed_time_ms_{part}"]
        assert all(0 < float(milliseconds) < 60_000 for _, milliseconds in lines)


def two_engines(folder: str) -> None:
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "csv_monitor": {"enabled": True, "output_path": folder, "job_name": "run"},
    }
    plan = Plan.build(config, registry=Registry.installed().with_plugins(CsvMonitor))
    with drivetrain.Job.open(plan) as job:
        for engine in (job.engine(mlp()), job.engine(mlp())):
            engine.backward(engine(*batches(1)[0]))
            engine.step()


def test_every_engine_of_a_job_has_a_folder_of_its_own(tmp_path: Path) -> None:
    run_distributed(two_engines, 1, str(tmp_path))
    for folder in ("run", "run.1"):
        assert rows(tmp_path / folder / RATE) == [["step", "lr"], ["4", "0.5"]]


def leave_without_closing(folder: str) -> None:
    config = {
        "train_batch_size": 4,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "csv_monitor": {"enabled": True, "output_path": folder, "job_name": "run"},
    }
    engine, *_ = drivetrain.initialize(
        model=mlp(), config=config, registry=Registry.installed().with_plugins(CsvMonitor)
    )
    engine.backward(engine(*batches(1)[0]))
    engine.step()


def test_what_is_buffered_is_written_when_a_script_just_ends(tmp_path: Path) -> None:
    path = [str(Path(__file__).parent), *sys.path]
    script = f"""
import sys; sys.path[:] = {path!r}
from test_csv_monitor import leave_without_closing
leave_without_closing({str(tmp_path)!r})
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path / "run" / LOSS)) == 2


def test_a_folder_that_cannot_be_written_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    section = {"enabled": True, "output_path": str(tmp_path / "file")}
    with pytest.raises(RanksFailedError, match=r"csv_monitor.output_path: rank 0 cannot write to"):
        run_distributed(train, 2, section, 1, {})


def test_a_section_that_is_not_enabled_writes_nothing(tmp_path: Path) -> None:
    run_distributed(train, 1, {"output_path": str(tmp_path)}, 1, {})
    assert list(tmp_path.iterdir()) == []
