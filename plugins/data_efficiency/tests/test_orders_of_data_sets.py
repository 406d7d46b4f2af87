"""A data set that says in which order its samples are best read."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import torch
from drivetrain_data_efficiency import DataEfficiency
from metric_files import Numbers
from torch import nn

import drivetrain
from drivetrain.plan.registry import Registry


class Backwards:
    """The last sample first, in every epoch."""

    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def items(self, epoch: int, start: int) -> Iterator[Sequence[int]]:
        return ([self.samples - 1 - number] for number in range(start, self.samples))

    def state_dict(self, epoch: int, start: int) -> Any:
        return None

    def load_state_dict(self, state: Any) -> None:
        assert state is None


class Sharded(Numbers):
    def sample_order(self, seed: int) -> Backwards:
        assert seed == 3
        return Backwards(len(self))


class First(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen: list[int] = []

    def forward(self, rows: torch.Tensor) -> torch.Tensor:
        self.seen += rows[:, 0].tolist()
        return self.weight * 1.0


def test_its_order_is_used_and_resumed(tmp_path: Any) -> None:
    def start() -> Any:
        engine, *_ = drivetrain.initialize(
            model=First(),
            training_data=Sharded(12),
            config={
                "train_batch_size": 4,
                "optimizer": {"type": "SGD", "params": {"lr": 0.5}},
                "seed": 3,
                "data_efficiency": {"enabled": True, "data_sampling": {"enabled": True}},
            },
            registry=Registry.installed().with_plugins(DataEfficiency),
        )
        return engine

    engine = start()
    engine.train_batch()
    engine.save_checkpoint(str(tmp_path))
    engine.destroy()
    engine = start()
    engine.load_checkpoint(str(tmp_path))
    for _ in range(3):
        engine.train_batch()
    assert engine.module.seen == [7, 6, 5, 4, 3, 2, 1, 0, 11, 10, 9, 8]
    engine.destroy()
