"""A small engine with random streams, buffers and a loader, for tests of checkpoints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

import drivetrain
from drivetrain.engine.engine import Engine

CONFIG: dict[str, Any] = {
    "train_batch_size": 12,
    "gradient_clipping": 0.5,
    "optimizer": {"type": "AdamW", "params": {"lr": 1e-2}},
    "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 30}},
}

BF16 = {"bf16": {"enabled": True}, "data_types": {"buffer_dtype": "bf16"}}


class Model(nn.Module):
    """Dropout and batch statistics: random streams and buffers have to be restored, too."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(
            nn.Linear(4, 16), nn.BatchNorm1d(16), nn.Dropout(0.2), nn.Linear(16, 1)
        )

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return (self.layers(x.to(self.layers[0].weight.dtype)).float() - y).square().mean()


def make(**changes: Any) -> Engine:
    generator = torch.Generator().manual_seed(3)
    x = torch.randn(60, 4, generator=generator)
    module = Model()
    engine, *_ = drivetrain.initialize(
        model=module,
        model_parameters=module.parameters(),
        training_data=torch.utils.data.TensorDataset(x, x.sum(1, keepdim=True)),
        config={**CONFIG, **changes},
    )
    return engine


def train(engine: Engine, steps: int) -> list[float]:
    return [engine.train_batch().item() for _ in range(steps)]


def contents(engine: Engine) -> dict[str, list[float]]:
    """Every number of the engine's states, by kind and name."""
    found = {
        f"{f.kind} {f.name}": f.read().float().tolist()
        for f in engine.states.fragments()
        if f.kind != "gradient"
    }
    return found | {n: b.float().tolist() for n, b in engine.module.named_buffers() if b.dim()}


def save_and_report(folder: str, changes: dict[str, Any]) -> dict[str, list[float]]:
    engine = make(**changes)
    train(engine, 3)
    engine.save_checkpoint(folder, "t")
    found = contents(engine)
    engine.destroy()
    return found


def load_and_report(folder: str, changes: dict[str, Any]) -> dict[str, list[float]]:
    engine = make(**changes)
    engine.load_checkpoint(folder, "t")
    found = contents(engine)
    engine.destroy()
    return found


def damage(path: Path) -> None:
    """Flip one bit of the first tensor in a file."""
    data = bytearray(path.read_bytes())
    data[8 + int.from_bytes(data[:8], "little") + 4] ^= 1
    path.write_bytes(data)
