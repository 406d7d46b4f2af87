"""Event files hold the numbers of training, read back with TensorBoard's own reader."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_tensorboard import TensorBoard
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import drivetrain
from drivetrain.plan.registry import Registry
from drivetrain.testing import (
    PluginConformance,
    RanksFailedError,
    data,
    reference_losses,
    run_distributed,
)
from drivetrain.testing.models import mlp


class TestTensorBoard(PluginConformance):
    plugin = TensorBoard
    config = {"tensorboard": {"enabled": True, "output_path": "logs"}}


def batches(steps: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    inputs, targets = data.vectors(4 * steps)
    return [(inputs[i : i + 4], targets[i : i + 4]) for i in range(0, 4 * steps, 4)]


def train(section: dict[str, Any]) -> None:
    config = {
        "train_batch_size": 4,
        "gradient_clipping": 0.0,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "scheduler": {"type": "StepLR", "params": {"step_size": 1, "gamma": 0.5}},
        "tensorboard": section,
    }
    engine, *_ = drivetrain.initialize(
        model=mlp(), config=config, registry=Registry.installed().with_plugins(TensorBoard)
    )
    rank, share = engine.job.rank, engine.train_micro_batch_size_per_gpu()
    for inputs, targets in batches(3):
        rows = slice(rank * share, (rank + 1) * share)
        engine.backward(engine(inputs[rows], targets[rows]))
        engine.step()
    engine.destroy()


@pytest.mark.parametrize("world", [1, 2])
def test_event_files_hold_the_references_losses_and_rates(world: int, tmp_path: Path) -> None:
    section = {"enabled": True, "output_path": str(tmp_path), "job_name": "run"}
    run_distributed(train, world, section)
    expected = reference_losses(
        mlp(),
        [[batch] for batch in batches(3)],
        lambda p: torch.optim.SGD(p, lr=0.5),
        learning_rate=lambda step: 0.5 * 0.5**step,
    )
    assert len(list((tmp_path / "run").iterdir())) == 1
    events = EventAccumulator(str(tmp_path / "run")).Reload()
    names = ["Train/Samples/lr", "Train/Samples/train_loss"]
    assert sorted(events.Tags()["scalars"]) == names
    rates, losses = (events.Scalars(name) for name in names)
    assert [(event.step, event.value) for event in rates] == [(4, 0.5), (8, 0.25), (12, 0.125)]
    assert [event.step for event in losses] == [4, 8, 12]
    assert [event.value for event in losses] == pytest.approx(expected, rel=1e-6)


def test_the_default_job_is_named_as_in_deepspeed(tmp_path: Path) -> None:
    run_distributed(train, 1, {"enabled": True, "output_path": str(tmp_path)})
    assert [path.name for path in tmp_path.iterdir()] == ["DeepSpeedJobName"]


def test_a_folder_that_cannot_be_written_is_named_with_its_key(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    section = {"enabled": True, "output_path": str(tmp_path / "file")}
    with pytest.raises(RanksFailedError, match=r"tensorboard.output_path: rank 0 cannot write to"):
        run_distributed(train, 2, section)
