"""The run whose checkpoint lies beside this file: two ranks, ZeRO's second stage, Adam in bfloat16.

It was made by commit 8ce3f81, whose packages went before all others, and is never made again by a
later version. The format is ``drivetrain-checkpoint-2``::

    git worktree add old 8ce3f81
    plugins=$(find old/plugins -name pyproject.toml -not -path "*/tests/*" -printf "%h ")
    pip install --no-deps --no-build-isolation --target site old/core old/kernels $plugins
    PYTHONPATH=site python tests/data/released_checkpoint/released_run.py

``checkpoint/`` is what ``save_checkpoint`` wrote after three steps; ``expected.npz`` has the whole
tensors of that moment under ``kind/name``, put together from the fragments of both ranks, and under
``losses`` the mean losses of the next three steps.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import nn

import drivetrain
from drivetrain.testing import run_distributed

if TYPE_CHECKING:
    from drivetrain.engine.engine import Engine  # it lay elsewhere then

HERE = Path(__file__).parent
TAG, SAVED, STEPS, ROWS = "step3", 3, 6, 4
CLIENT_STATE = {"epoch": 2, "note": "released"}


class Model(nn.Module):
    """Odd sizes, a frozen parameter and a buffer."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.stem = nn.Linear(5, 11)
        self.head = nn.Linear(11, 3)
        self.head.bias.requires_grad_(False)
        self.register_buffer("shift", torch.linspace(0, 1, 11))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        dtype = self.stem.weight.dtype
        hidden = torch.tanh(self.stem(x.to(dtype)) + self.shift).to(dtype)
        return self.head(hidden).float().square().mean()


def make(stage: int, ranks: int) -> Engine:
    """An engine that differs from the saved one by ``stage`` and ``ranks`` alone."""
    config = {
        "train_micro_batch_size_per_gpu": ROWS // ranks,
        "optimizer": {"type": "Adam", "params": {"lr": 1e-2, "weight_decay": 0.1}},
        "scheduler": {"type": "WarmupLR", "params": {"warmup_num_steps": 20}},
        "bf16": {"enabled": True},
        "data_types": {"buffer_dtype": "fp32"},
        "zero_optimization": {"stage": stage},
    }
    return drivetrain.initialize(model=Model(), config=config)[0]


def train(engine: Engine, steps: range) -> list[float]:
    """This rank's losses; all ranks together have the same rows, however many they are."""
    losses = []
    rank, ranks = engine.job.rank, engine.job.world_size
    for step in steps:
        rows = torch.randn(ROWS, 5, generator=torch.Generator().manual_seed(step))
        loss = engine(rows.chunk(ranks)[rank])
        engine.backward(loss)
        engine.step()
        losses.append(loss.item())
    return losses


State = dict[str, tuple[tuple[int, ...], list[tuple[Any, Any, list[float]]]]]
"""kind/name -> shape, and the boxes of one rank: offset, size, elements."""


def state(engine: Engine) -> State:
    """This rank's part of every number that a checkpoint holds."""
    found: State = {}
    for f in engine.states.fragments():
        flat = f.read().double().cpu().flatten()
        cuts = [(b, flat[b.local_offset : b.local_offset + b.numel].tolist()) for b in f.boxes]
        if f.kind != "gradient":
            boxes = [(box.global_offset, box.size, values) for box, values in cuts]
            found[f"{f.kind}/{f.name}"] = (tuple(f.global_shape), boxes)
    for name, buffer in engine.module.named_buffers():
        values = buffer.double().flatten().tolist()
        found[f"buffer/{name}"] = (
            tuple(buffer.shape),
            [((0,) * buffer.dim(), tuple(buffer.shape), values)],
        )
    return found


def whole(states: list[State]) -> dict[str, np.ndarray]:
    """The parts of all ranks, put together."""
    found: dict[str, np.ndarray] = {}
    for key in {key: None for state in states for key in state}:
        parts = [state[key] for state in states if key in state]
        found[key] = np.full(parts[0][0], np.nan)
        for _, boxes in parts:
            for offset, size, values in boxes:
                place = tuple(slice(o, o + s) for o, s in zip(offset, size, strict=True))
                found[key][place] = np.reshape(values, size)
    return found


def save(folder: str) -> tuple[State, list[float]]:
    """Train, save, and go on."""
    engine = make(2, 2)
    train(engine, range(SAVED))
    saved = state(engine)
    engine.save_checkpoint(folder, TAG, client_state=CLIENT_STATE)
    losses = train(engine, range(SAVED, STEPS))
    engine.destroy()
    return saved, losses


def main() -> None:
    """Make what lies beside this file."""
    ends = run_distributed(save, 2, str(HERE / "checkpoint"))
    losses = np.mean([losses for _, losses in ends], axis=0)
    np.savez_compressed(HERE / "expected.npz", losses=losses, **whole([s for s, _ in ends]))


if __name__ == "__main__":
    main()
