"""A curriculum in an engine: accumulation, checkpoints, other numbers of ranks, batches."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from drivetrain_data_efficiency import DataEfficiency, current_difficulties
from metric_files import Numbers, write_metric
from torch import nn

import drivetrain
from drivetrain.errors import ConfigError
from drivetrain.plan.registry import Registry
from drivetrain.testing import run_distributed

VALUES = [(7 * i) % 10 + 1 for i in range(60)]


class Sums(nn.Module):
    """Learns from the first number of each sample; keeps what it has seen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[torch.Tensor] = []

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.seen.append(rows)
        return (self.weight * 0.01 - rows[:, 0].double() / 60).square().mean()


def start(section: dict[str, Any], micro: int, dataset: Any = None, **keys: Any) -> Any:
    config = {
        "train_batch_size": 8,
        "train_micro_batch_size_per_gpu": micro,
        "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
        "data_efficiency": {
            "enabled": True,
            "seed": 3,
            "data_sampling": {"enabled": True, "curriculum_learning": section},
        },
        **keys,
    }
    engine, *_ = drivetrain.initialize(
        model=Sums(),
        config=config,
        training_data=dataset or Numbers(60),
        registry=Registry.installed().with_plugins(DataEfficiency),
    )
    return engine


def curriculum(folder: Path, **keys: Any) -> dict[str, Any]:
    metric = {
        "min_difficulty": 2,
        "max_difficulty": 10,
        "schedule_type": "fixed_linear",
        "schedule_config": {"total_curriculum_step": 10, "difficulty_step": 2},
        **write_metric(folder, "length", VALUES),
        **keys,
    }
    return {"enabled": True, "curriculum_metrics": {"length": metric}}


def train(folder: str, micro: int, steps: int, load: bool) -> Any:
    engine = start(curriculum(Path(folder)), micro)
    if load:
        engine.load_checkpoint(folder)
    losses = [float(engine.train_batch()) for _ in range(steps)]
    engine.save_checkpoint(folder)
    seen = [int(row) for rows in engine.module.seen for row in rows[:, 0]]
    answer = losses, float(engine.module.weight), seen
    engine.destroy()
    return answer


def test_a_resume_on_other_ranks_goes_on_with_the_same_samples(tmp_path: Path) -> None:
    folders = [str(tmp_path / name) for name in "ab"]
    [(losses, weight, seen)] = run_distributed(train, 1, folders[0], 8, 9, False)
    parts = run_distributed(train, 2, folders[1], 2, 4, False)
    rest = run_distributed(train, 1, folders[1], 4, 5, True)
    assert parts[0][0] + rest[0][0] == pytest.approx(losses, rel=1e-6)
    assert rest[0][1] == pytest.approx(weight, rel=1e-6)
    both = sorted(parts[0][2] + parts[1][2]) + sorted(rest[0][2])
    assert both == sorted(seen[:32]) + sorted(seen[32:])


def test_scripts_change_batches_by_the_difficulty_of_the_step(tmp_path: Path) -> None:
    section = curriculum(tmp_path, schedule_type="custom", schedule_config={})
    engine = start(section, 4)
    engine.set_custom_curriculum_learning_schedule({"length": lambda step: 2 * step})
    states = []

    def cut(batch: torch.Tensor, state: dict[str, Any]) -> torch.Tensor:
        states.append(state)
        return batch[:, : state["current_difficulties"]["length"]]

    engine.set_data_post_process_func(cut)
    for _ in range(3):
        engine.train_batch()
    assert [rows.shape[1] for rows in engine.module.seen] == [2, 2, 4, 4, 6, 6]
    assert states[-1] == {"curriculum_step": 3, "current_difficulties": {"length": 6}}
    assert current_difficulties(engine) == {"length": 6}
    engine.destroy()


def test_truncate_cuts_batches_without_a_function(tmp_path: Path) -> None:
    section = curriculum(tmp_path, clustering_type="single_cluster", truncate=True)
    engine = start(section, 8)
    for _ in range(4):
        engine.train_batch()
    assert [rows.shape[1] for rows in engine.module.seen] == [2, 2, 4, 4]
    engine.destroy()


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_change_neither_samples_nor_positions(tmp_path: Path, workers: int) -> None:
    section = curriculum(tmp_path)
    keys = {"enabled": True, "curriculum_learning": section, "num_workers": workers}
    engine = start({}, 4, data_efficiency={"enabled": True, "seed": 3, "data_sampling": keys})
    for _ in range(3):
        engine.train_batch()
    state = engine.training_dataloader.state_dict()
    assert state["order"]["step"] == 3
    assert state["consumed"] == 24
    engine.save_checkpoint(str(tmp_path / "ckpt"))
    for _ in range(2):
        engine.train_batch()
    rest = torch.cat(engine.module.seen[6:])
    engine.destroy()
    engine = start({}, 4, data_efficiency={"enabled": True, "seed": 3, "data_sampling": keys})
    engine.load_checkpoint(str(tmp_path / "ckpt"))
    for _ in range(2):
        engine.train_batch()
    assert torch.equal(torch.cat(engine.module.seen), rest)
    engine.destroy()


def test_the_switch_above_turns_everything_off(tmp_path: Path) -> None:
    sampling = {"enabled": False, "curriculum_learning": curriculum(tmp_path)}
    keys = {"enabled": True, "data_sampling": sampling}
    engine = start({}, 8, data_efficiency=keys)
    with pytest.raises(ConfigError, match="curriculum_learning enabled"):
        engine.set_data_post_process_func(lambda batch, state: batch)
    engine.train_batch()
    assert "order" not in engine.training_dataloader.state_dict()
    engine.destroy()


def test_a_sampler_and_a_stream_are_refused(tmp_path: Path) -> None:
    engine = start(curriculum(tmp_path), 8)
    with pytest.raises(ConfigError, match="a sampler has no place"):
        engine.deepspeed_io(Numbers(60), sampler=range(60))
    held_out = engine.deepspeed_io(Numbers(9), route="eval")
    assert [int(row[0]) for rows in held_out for row in rows] == list(range(9))

    class Stream(torch.utils.data.IterableDataset):  # type: ignore[type-arg]
        def __iter__(self) -> Any:
            return iter(range(3))

    with pytest.raises(ConfigError, match="Stream is a stream"):
        engine.deepspeed_io(Stream())
    with pytest.raises(ConfigError, match="DataLoader is a stream or a loader"):
        engine.deepspeed_io(torch.utils.data.DataLoader(Numbers(60)))
    engine.destroy()
